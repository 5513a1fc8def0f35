"""A sampler of `rl_sync` that is a real vLLM on this machine.

python -m benchmarks.rl_vllm MODEL FILE    scores the tokens of a file, and writes what it finds
"""

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from pacatune.integrations.vllm import VllmTransport
from pacatune.sync import ColumnSource
from pacatune.sync.message import Columns


class Vllm:
    """A sampler that is a real vLLM.

    `method` is `paca`, `lora-adapter` for matrices beside each weight, `merged` for whole tensors,
    or `base` for vLLM as it is, whose weights cannot be written on a CPU.
    """

    name = "vLLM"

    def __init__(self, path: str, method: str, rank: int) -> None:
        from vllm import LLM

        ours = {"weight_transfer_config": {"backend": "pacatune"}}
        adapters = {"enable_lora": True, "max_lora_rank": rank}
        options: dict[str, Any] = {"base": {}, "lora-adapter": adapters}.get(method, ours)
        # TRL's way to write whole tensors needs the model in this process, where one vLLM may be.
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = str(int(method != "merged"))
        # As many threads as torch has, which OMP_NUM_THREADS tells.
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        for name in ("VLLM_CPU_KVCACHE_SPACE", "VLLM_NO_USAGE_STATS"):
            os.environ.setdefault(name, "1")
        self.llm = LLM(
            path,
            dtype="bfloat16",
            max_num_seqs=32,
            max_model_len=256,
            max_num_batched_tokens=256,
            enforce_eager=True,
            enable_prefix_caching=False,
            disable_log_stats=True,
            **options,
        )
        self.transport = VllmTransport(self.llm) if options is ours else None
        self.folder = tempfile.TemporaryDirectory()
        self.lora: Any = None

    def write(self, tensors: Iterator[tuple[str, Tensor]]) -> int:
        """Write whole tensors as TRL does it."""
        runner = self.llm.llm_engine.model_executor.driver_worker.model_runner
        num_bytes = 0
        for name, tensor in tensors:
            runner.model.load_weights([(name, tensor)])
            num_bytes += tensor.nbytes
        return num_bytes

    def send(self, source: ColumnSource) -> Columns:
        """Send columns; return them."""
        return source.send(self.transport)

    def score(self, ids: Tensor) -> Tensor:
        """Return (B, T - 1) log-probabilities of tokens that are given."""
        from vllm import SamplingParams

        rows: Any = [{"prompt_token_ids": row} for row in ids.tolist()]
        how = SamplingParams(max_tokens=1, prompt_logprobs=0)
        found = self.llm.generate(rows, how, use_tqdm=False, lora_request=self.lora)
        logps = [
            [at[token].logprob for at, token in zip(o.prompt_logprobs[1:], row[1:], strict=True)]
            for o, row in zip(found, ids.tolist(), strict=True)
        ]
        return torch.tensor(logps)

    def score_anew(self, path: str, ids: Tensor) -> Tensor:
        """Return the same of a vLLM that is started with a model, in processes of its own."""
        file = Path(self.folder.name, "ids.safetensors")
        save_file({"ids": ids}, file)
        subprocess.run([sys.executable, "-m", __spec__.name, path, str(file)], check=True)
        return load_file(file)["logps"]

    def write_adapter(self, model: Any) -> int:
        """Hand over a folder, as vLLM takes adapters."""
        from vllm.lora.request import LoRARequest

        number = 1 + (self.lora.lora_int_id if self.lora else 0)
        folder = Path(self.folder.name, str(number))
        model.save_pretrained(str(folder))
        self.lora = LoRARequest(str(number), number, str(folder))
        self.llm.llm_engine.add_lora(self.lora)
        return sum(p.numel() for name, p in model.named_parameters() if "lora_" in name) * 2

    def draw(self, prompts: Tensor, num_tokens: int, seed: int) -> tuple[Tensor, Tensor]:
        """Return (B, T) prompts with answers, and (B, N) log-probabilities at their drawing."""
        from vllm import SamplingParams

        rows: Any = [{"prompt_token_ids": row} for row in prompts.tolist()]
        how = [
            SamplingParams(ignore_eos=True, max_tokens=num_tokens, logprobs=0, seed=number)
            for number in range(seed * len(rows), (seed + 1) * len(rows))
        ]
        answers = self.llm.generate(rows, how, use_tqdm=False, lora_request=self.lora)
        new = torch.tensor([list(one.outputs[0].token_ids) for one in answers])
        logps = [
            [at[token].logprob for at, token in zip(o.logprobs, o.token_ids, strict=True)]
            for o in (one.outputs[0] for one in answers)
        ]
        return torch.cat([prompts, new], 1), torch.tensor(logps)

    def close(self) -> None:
        """End its processes."""
        self.llm.llm_engine.engine_core.shutdown()
        self.folder.cleanup()


if __name__ == "__main__":
    server = Vllm(sys.argv[1], "paca", 1)
    save_file({"logps": server.score(load_file(sys.argv[2])["ids"])}, sys.argv[2])
    server.close()
