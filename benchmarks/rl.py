"""Train by GRPO beside a sampler that gets columns, merged LoRA, or LoRA's matrices.

    sh tools/test_vllm.sh -m benchmarks.rl         writes benchmarks/results/rl_run-part.json; hours

The task is that of examples/grpo.py: three words to reverse, after a short SFT. Each step draws 8
answers to each of 4 problems, takes one step of AdamW on them, and syncs. There is no correction
for what the sampler's log-probabilities differ from the trainer's: that difference is measured, by
the names of verl and TRL (`rollout_probs_diff`, `sampling_logp_difference`, `k3_kl`), beside
rewards, bytes as HTTP and files carry them, and times of syncs and tokens.

The trainer is SmolLM2-135M-Instruct in bfloat16. The sampler is a vLLM where there is one, else a
model of transformers, which scores the drawn tokens with the trainer's weights once more. What is
kept in --work is not run again.

rl_sync.json, rl_run.json and rl_codes.json are of the commits that they name: 4fc47b0cc, 0559c38a4
and 5ffcec28e. The programs there have more, which was measured once: full fine-tuning, PEFT 0.22's
PaCA, elements found by a snapshot, other rates and dtypes, what is served after 100 syncs, sizes of
larger models by their shapes, and a sampler of FP8.
"""

import argparse
import functools
import importlib.util
import json
import os
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.results import at_least_1, mean_row, new_parser, record, write_json
from pacatune.adapters.base import load_base
from pacatune.measure.methods import add_adapter
from pacatune.methods import method_of
from pacatune.reports.rows import Row
from pacatune.sync import ColumnReceiver, ColumnSource, InProcess
from pacatune.sync.message import Columns, ColumnSet, Positions, to_wire

RANK, RATE = 16, 1e-3
SENT = "sent per sync"
METHODS = {
    "paca": "PaCA's columns",
    "lora-adapter": "LoRA's matrices, which the sampler adds to each token",
    # Its vLLM is in this process, where TRL writes whole tensors; it is the last one here.
    "lora": "LoRA, merged, every tensor, unmerged",
}
_ANSWERS, _PROBLEMS, _NEW, _PARTS = 8, 4, 12, 4


@functools.cache
def base_path() -> str:
    """Return the folder of a real model, made from a package."""
    from examples.packaged import prepare

    return str(prepare("smollm2"))


def load(path: str) -> Any:
    """Return a model in bfloat16."""
    return load_base(path, task_type="CAUSAL_LM", dtype="bfloat16")


def adapted(model: Any, method: str, seed: int) -> Any:
    """Return a model with the adapter of a method."""
    return add_adapter(model, method_of(method), rank=RANK, seed=seed)


def logps_of(model: Any, ids: Tensor) -> Tensor:
    """Return (B, T - 1) log-probabilities of tokens, in one pass."""
    logits = model(input_ids=ids).logits[:, :-1].float()
    return F.log_softmax(logits, -1).gather(-1, ids[:, 1:, None])[..., 0]


def matrices_of(model: nn.Module) -> dict[str, Tensor]:
    """Return LoRA's matrices as they are sent."""
    named = model.named_parameters()
    return {name: p.detach().bfloat16() for name, p in named if "lora_" in name}


@torch.no_grad()
def copy_(model: nn.Module, tensors: Iterable[tuple[str, Tensor]]) -> int:
    """Copy tensors into a model's own; return how many bytes they have."""
    own = dict(model.named_parameters())
    return sum(own[name].copy_(tensor).nbytes for name, tensor in tensors)


class Trainer:
    """A model that one method trains."""

    def __init__(self, method: str, path: str, seed: int) -> None:
        self.model = adapted(load(path), method.partition("-")[0], seed)
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, fused=True)

    def step(self, loss: Tensor, rate: float) -> None:
        """Take a step."""
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.param_groups[0]["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad()

    @torch.no_grad()
    def merged(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the whole model with its LoRA merged, as TRL does, by the checkpoint's names."""
        self.model.merge_adapter()
        for name, tensor in self.model.named_parameters():
            if "lora_" not in name:
                plain = name.removeprefix("base_model.model.").replace(".base_layer", "")
                yield plain, tensor.detach()
        self.model.unmerge_adapter()


class Transformers:
    """A sampler that is a model of transformers, with LoRA's matrices beside it or without."""

    name = "transformers"

    def __init__(self, path: str, method: str) -> None:
        self.model = load(path).eval()
        self.receiver, self.transport = ColumnReceiver(self.model), InProcess()
        if method == "lora-adapter":
            self.model = adapted(self.model, "lora", seed=0).eval()

    def send(self, source: ColumnSource) -> Columns:
        """Send columns; return them."""
        columns = source.send(self.transport)
        self.receiver.receive(self.transport)
        return columns

    def write(self, tensors: Iterable[tuple[str, Tensor]]) -> int:
        """Copy whole tensors; return how many bytes they have."""
        return copy_(self.model, tensors)

    def write_adapter(self, model: nn.Module) -> None:
        """Copy LoRA's matrices, which vLLM and PEFT hold in the model's dtype."""
        copy_(self.model, matrices_of(model).items())

    def revert(self) -> None:
        """Take columns out again."""
        self.receiver.revert()

    @torch.no_grad()
    def score(self, ids: Tensor) -> Tensor:
        """Return (B, T - 1) log-probabilities of tokens that are there."""
        return logps_of(self.model, ids)

    @torch.no_grad()
    def draw(self, prompts: Tensor, num_tokens: int, seed: int) -> tuple[Tensor, Tensor]:
        """Return (B, T) prompts with answers, and (B, N) log-probabilities at their drawing."""
        torch.manual_seed(seed)
        self.model.generation_config.eos_token_id = None
        drawn = self.model.generate(
            prompts,
            attention_mask=torch.ones_like(prompts),
            do_sample=True,
            top_k=0,
            max_new_tokens=num_tokens,
            pad_token_id=0,
            output_logits=True,
            return_dict_in_generate=True,
        )
        logps = torch.stack(drawn.logits, 1).log_softmax(-1)
        ids = drawn.sequences
        return ids, logps.gather(-1, ids[:, -num_tokens:, None])[..., 0]

    def close(self) -> None:
        """Leave it to Python."""


class Vllm:
    """A sampler that is a real vLLM on this machine."""

    name = "vLLM"

    def __init__(self, path: str, method: str) -> None:
        from vllm import LLM

        from pacatune.integrations.vllm import VllmTransport

        options: dict[str, Any] = {"weight_transfer_config": {"backend": "pacatune"}}
        if method == "lora-adapter":
            options = {"enable_lora": True, "max_lora_rank": RANK}
        # TRL's way to write whole tensors needs the model in this process.
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = str(int(method != "lora"))
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
        self.folder = tempfile.TemporaryDirectory()
        self.lora: Any = None
        self.transport = VllmTransport(self.llm) if method == "paca" else None

    def send(self, source: ColumnSource) -> Columns:
        """Send columns; return them."""
        return source.send(self.transport)

    def write(self, tensors: Iterable[tuple[str, Tensor]]) -> int:
        """Write whole tensors as TRL does it."""
        model = self.llm.llm_engine.model_executor.driver_worker.model_runner.model
        num_bytes = 0
        for name, tensor in tensors:
            model.load_weights([(name, tensor)])
            num_bytes += tensor.nbytes
        return num_bytes

    def write_adapter(self, model: Any) -> None:
        """Hand over a folder, as vLLM takes adapters."""
        from vllm.lora.request import LoRARequest

        number = 1 + (self.lora.lora_int_id if self.lora else 0)
        folder = Path(self.folder.name, str(number))
        model.save_pretrained(str(folder))
        self.lora = LoRARequest(str(number), number, str(folder))
        self.llm.llm_engine.add_lora(self.lora)

    def revert(self) -> None:
        """Take columns out again."""
        self.transport.revert()

    def draw(self, prompts: Tensor, num_tokens: int, seed: int) -> tuple[Tensor, Tensor]:
        """Return (B, T) prompts with answers, and (B, N) log-probabilities at their drawing."""
        from vllm import SamplingParams

        rows: Any = [{"prompt_token_ids": row} for row in prompts.tolist()]
        how = [
            SamplingParams(ignore_eos=True, max_tokens=num_tokens, logprobs=0, seed=number)
            for number in range(seed * len(rows), (seed + 1) * len(rows))
        ]
        requests = self.llm.generate(rows, how, use_tqdm=False, lora_request=self.lora)
        answers = [request.outputs[0] for request in requests]
        logps = [
            [at[token].logprob for at, token in zip(a.logprobs, a.token_ids, strict=True)]
            for a in answers
        ]
        new = torch.tensor([list(answer.token_ids) for answer in answers])
        return torch.cat([prompts, new], 1), torch.tensor(logps)

    def close(self) -> None:
        """End its processes."""
        self.llm.llm_engine.engine_core.shutdown()
        self.folder.cleanup()


class Matrices:
    """LoRA's matrices on the wire, as columns are there: compressed where a sync follows one."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.number = model, 0
        self.last: Tensor | None = None
        sets = tuple(
            ColumnSet.at(
                name=name,
                parameter=name,
                dim=1,
                shape=tuple(matrix.shape),
                dtype=torch.bfloat16,
                indices=torch.arange(matrix.shape[1]),
            )
            for name, matrix in matrices_of(model).items()
        )
        self.positions = Positions(sets=sets, shapes={}, run="lora")

    def columns(self) -> Columns:
        """Return a sync."""
        now = matrices_of(self.model)
        buffer = torch.cat(
            [now[item.name].view(torch.uint8).view(-1) for item in self.positions.sets]
        )
        self.number, last, self.last = self.number + 1, self.last, buffer
        return Columns(positions=self.positions, number=self.number, buffer=buffer, last=last)


class Sync:
    """Brings what a trainer holds to its sampler, and counts it."""

    def __init__(self, method: str, trainer: Trainer, sampler: Any) -> None:
        self.trainer, self.sampler = trainer, sampler
        self.num_bytes, self.ms = list[float](), list[float]()
        self.source = self.matrices = None
        if method == "paca":
            self.source = ColumnSource(trainer.model, torch.bfloat16)
        elif method == "lora-adapter":
            self.matrices = Matrices(trainer.model)

    def __call__(self) -> None:
        """Sync."""
        start, columns, num_bytes = time.perf_counter(), None, 0
        if self.source is not None:
            columns = self.sampler.send(self.source)
        elif self.matrices is not None:
            self.sampler.write_adapter(self.trainer.model)
        else:
            num_bytes = self.sampler.write(self.trainer.merged())
        self.ms.append(1e3 * (time.perf_counter() - start))
        if self.matrices is not None:
            columns = self.matrices.columns()
        self.num_bytes.append(num_bytes if columns is None else to_wire(columns)[1].nbytes)


def agreement(trained: Tensor, drawn: Tensor) -> dict[str, float]:
    """Return how far a sampler's log-probabilities of what it drew are from the trainer's.

    By the names of verl and TRL; the last one, in per cent, is what a clip to these bounds cuts.
    """
    trained, drawn = trained.double(), drawn.double()
    probs, logps, ratio = trained.exp() - drawn.exp(), trained - drawn, (trained - drawn).exp()
    return {
        "rollout_probs_diff, mean": float(probs.abs().mean()),
        "rollout_probs_diff, max": float(probs.abs().max()),
        "sampling_logp_difference, mean": float(logps.abs().mean()),
        "sampling_logp_difference, max": float(logps.abs().max()),
        "k3_kl": float((ratio - 1 - logps).mean()),
        "ratios beyond 0.8 to 1.25": 100 * float(((ratio < 0.8) | (ratio > 1.25)).double().mean()),
    }


Seen = dict[str, list[float]]
"""Quantity -> its numbers in one run."""


class Problems:
    """Problems whose prompts have equally many tokens, so that nothing need be padded."""

    def __init__(self, path: str, seed: int) -> None:
        import reasoning_gym
        from transformers import AutoTokenizer

        from examples.grpo import TASK, TEMPLATE, WORDS

        self.data = reasoning_gym.create_dataset(TASK, seed=seed * 10**6, size=2000, **WORDS)
        self.tokenizer = AutoTokenizer.from_pretrained(path)
        render = functools.partial(
            self.tokenizer.apply_chat_template, chat_template=TEMPLATE, return_dict=False
        )
        by_length = defaultdict(list)
        for problem in self.data:
            ids = render([{"role": "user", "content": problem["question"]}])
            by_length[len(ids)].append((problem, ids))
        self.rows = max(by_length.values(), key=len)

    def batch(self, number: int) -> tuple[list[Any], Tensor]:
        """Return the problems of a step, each as often as it is answered, and (B, T) prompts."""
        start = number * _PROBLEMS
        some = [self.rows[(start + i) % len(self.rows)] for i in range(_PROBLEMS)]
        repeated = [row for row in some for _ in range(_ANSWERS)]
        return [problem for problem, _ in repeated], torch.tensor([ids for _, ids in repeated])

    def rewards(self, problems: list[Any], answers: Tensor, mask: Tensor) -> Tensor:
        """Return (B,) scores of (B, N) tokens up to the first end."""
        texts = [
            self.tokenizer.decode(row[kept], skip_special_tokens=True).strip()
            for row, kept in zip(answers, mask, strict=True)
        ]
        return torch.tensor([*map(self.data.score_answer, texts, problems)])


def grpo_loss(logps: Tensor, rewards: Tensor, mask: Tensor) -> Tensor:
    """Return GRPO's loss, by tokens (DAPO), of the answers that the model itself has drawn.

    Args:
        logps: (B, N) log-probabilities of their tokens.
        rewards: (P, A), A answers to each of P problems.
        mask: (B, N) which tokens belong to an answer.
    """
    centred = rewards - rewards.mean(1, keepdim=True)
    advantages = (centred / (rewards.std(1, keepdim=True) + 1e-4)).view(-1, 1)
    return -(advantages * (logps - logps.detach()).exp() * mask).sum() / mask.sum()


def run(method: str, seed: int, path: str, sampler: Any, steps: int) -> Seen:
    """Train; return what was seen at each step."""
    trainer, problems = Trainer(method, path, seed), Problems(path, seed)
    sync, seen = Sync(method, trainer, sampler), defaultdict[str, list[float]](list)
    part = max(steps // _PARTS, 1)
    sync()
    for number in range(steps):
        some, prompts = problems.batch(number)
        start = time.perf_counter()
        ids, drawn = sampler.draw(prompts, _NEW, seed * steps + number)
        seen["token"].append(1e3 * (time.perf_counter() - start) / _NEW)
        is_end = ids[:, -_NEW:] == problems.tokenizer.eos_token_id
        mask = (is_end.cumsum(1) - is_end.int()) == 0  # up to the first end, and this
        rewards = problems.rewards(some, ids[:, -_NEW:], mask)
        logps = logps_of(trainer.model.train(), ids)[:, -_NEW:]
        if isinstance(sampler, Transformers):
            difference = (sampler.score(ids)[:, -_NEW:] - logps.detach()).abs().max()
            seen["largest difference, scored anew"].append(float(difference))
        for what, value in agreement(logps.detach()[mask], drawn[mask]).items():
            seen[what].append(value)
        first = number // part * part
        seen[f"reward, steps {first + 1} to {first + part}"].append(float(rewards.mean()))
        loss = grpo_loss(logps, rewards.view(-1, _ANSWERS), mask)
        trainer.step(loss, RATE * (1 - number / steps))
        sync()
    # The first two have everything.
    return seen | {"complete sync": sync.num_bytes[:1], SENT: sync.num_bytes[2:], "sync": sync.ms}


def sft(folder: Path, seed: int) -> str:
    """Return a model in a folder that knows what an answer looks like, in bfloat16."""
    import reasoning_gym

    from examples.grpo import TASK, WORDS, fine_tune

    solved = reasoning_gym.create_dataset(TASK, seed=5 * 10**8, size=200, **WORDS)
    path = folder / "start"
    if not path.exists():
        with tempfile.TemporaryDirectory(dir=folder) as making:
            tuned = fine_tune(base_path(), list(solved), Path(making), seed)
            load(tuned).save_pretrained(tuned)
            Path(tuned).rename(path)
    return str(path)


def runs_of(method: str, path: str, make: Any, args: argparse.Namespace) -> dict[str, Seen]:
    """Run a method with each seed; return what was seen by seed."""
    sampler, seen = None, dict[str, Seen]()
    for seed in range(args.seeds):
        kept = args.work / f"{make.name}, {method}, {args.steps} steps, {seed}.json"
        if not kept.exists():
            sampler = sampler or make(path, method)
            write_json(run(method, seed, path, sampler, args.steps), kept)
            if method == "paca":
                sampler.revert()
            elif method == "lora":
                sampler.write(load(path).named_parameters())
        seen[f"seed {seed}"] = json.loads(kept.read_text(encoding="utf-8"))
    if sampler is not None:
        sampler.close()
    return seen


def rows_of(method: str, setting: str, runs: dict[str, Seen]) -> Iterator[Row]:
    """Return means over steps, and over seeds with their intervals."""
    units = {SENT: "bytes", "complete sync": "bytes", "sync": "ms", "token": "ms"}
    names = {"method": method, "setting": setting}
    for what in next(iter(runs.values())):
        unit = "%" if "0.8" in what else units.get(what, "")
        if what.endswith("max") or what.startswith("largest"):
            each = {seed: max(run[what]) for seed, run in runs.items()}
            yield Row(what=what, value=max(each.values()), each=each, n=len(each), **names)
        else:
            each = {seed: statistics.mean(run[what]) for seed, run in runs.items()}
            yield mean_row(what, each=each, unit=unit, **names)


def measure(args: argparse.Namespace) -> Iterator[Row]:
    """Return every row."""
    args.work.mkdir(parents=True, exist_ok=True)
    make: Any = Transformers if importlib.util.find_spec("vllm") is None else Vllm
    path = sft(args.work, args.seed)
    for method in args.methods:
        yield from rows_of(method, make.name, runs_of(method, path, make, args))


def main(options: list[str] | None = None) -> None:
    """Measure, write the result, print it."""
    parser = new_parser(__doc__, is_timed=True)
    add = parser.add_argument
    add("--steps", type=at_least_1, default=200, help="steps of each run")
    add("--seeds", type=at_least_1, default=3)
    add("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    add("--work", metavar="FOLDER", type=Path, default=Path(".cache/rl"), help="keeps runs")
    args = parser.parse_args(options)
    how = (
        f"SmolLM2-135M-Instruct after an SFT, bfloat16, r = {RANK}, {args.steps} steps of "
        f"{_ANSWERS} answers to each of {_PROBLEMS} problems, {args.seeds} seeds, rate {RATE:g} "
        "falling to 0; means over steps"
    )
    record("rl_run-part", how, lambda: list(measure(args)), args, options, METHODS)


if __name__ == "__main__":
    sys.exit(main())
