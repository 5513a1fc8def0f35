"""`pacatune train --task grpo` whose answers come from vLLM."""

import json
from functools import partial

import pytest

from tests.vllm.conftest import save_small_model


@pytest.fixture
def rewards(tmp_path, monkeypatch):
    (tmp_path / "my_rewards.py").write_text(
        "def varied(completions, **kwargs):\n"
        "    return [float(len(set(str(text)))) for text in completions]\n"
    )
    monkeypatch.syspath_prepend(tmp_path)


@pytest.mark.usefixtures("rewards")
def test_grpo_run(model_path, tmp_path, monkeypatch):
    from trl.generation import vllm_generation

    from pacatune.cli import main

    monkeypatch.setattr(vllm_generation, "LLM", partial(vllm_generation.LLM, enforce_eager=True))
    save_small_model(model_path, tmp_path / "model")
    rows = [{"prompt": f"Say something about {number}."} for number in range(12)]
    (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    training = {
        "output_dir": tmp_path / "run",
        "use_vllm": "true",
        "vllm_mode": "colocate",
        "vllm_max_model_length": 256,
        "max_steps": 3,
        "num_generations": 4,
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 4,
        "max_completion_length": 8,
        "learning_rate": 1e-3,
        "use_cpu": "true",
    }
    words = [word for k, v in training.items() for word in (f"--training.{k}", str(v))]
    words += [
        "--model.path",
        str(tmp_path / "model"),
        "--data.path",
        str(tmp_path / "prompts.jsonl"),
    ]
    words += ["--task", "grpo", "--reward", "my_rewards:varied", "--paca.r", "4"]
    assert main(["train", *words]) == 0
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    gaps = report["train_metrics"]["sampling/sampling_logp_difference/mean"]
    assert len(gaps) == 3
    assert max(value for _, value in gaps) < 0.1, gaps
    assert (tmp_path / "run" / "adapter_model.safetensors").exists()
