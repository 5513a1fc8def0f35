"""`pacatune train --task grpo` whose answers come from vLLM."""

import json

from tests.vllm.conftest import grpo_words, save_small_model

REWARD = """
def varied(completions, **kwargs):
    return [float(len(set(str(text)))) for text in completions]
"""


def test_grpo_run(model_path, tmp_path, monkeypatch, eager):
    from pacatune.cli import main

    (tmp_path / "my_rewards.py").write_text(REWARD)
    monkeypatch.syspath_prepend(tmp_path)
    save_small_model(model_path, tmp_path / "model")
    rows = [{"prompt": f"Say something about {number}."} for number in range(12)]
    (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    training = {"vllm_mode": "colocate", "vllm_max_model_length": 256, "max_steps": 3}
    training |= {"per_device_train_batch_size": 4, "per_device_eval_batch_size": 4}
    words = grpo_words(tmp_path, tmp_path / "model", "my_rewards:varied", **training)
    assert main([*words, "--paca.r", "4"]) == 0
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    gaps = report["train_metrics"]["sampling/sampling_logp_difference/mean"]
    assert len(gaps) == 3
    assert max(value for _, value in gaps) < 0.1, gaps
    assert (tmp_path / "run" / "adapter_model.safetensors").exists()
