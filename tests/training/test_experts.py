"""A run that trains the fused weights of experts."""

import pytest
import torch
from safetensors.torch import load_file

from pacatune.training import train
from tests.training.runs import refused
from tests.tuner.moe import BOTH, build


@pytest.fixture(scope="module")
def mixtral_dir(tmp_path_factory, tiny_tokenizer):
    folder = tmp_path_factory.mktemp("tiny-mixtral")
    build("mixtral", dtype=torch.float32, vocab_size=len(tiny_tokenizer)).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("method", "trained"),
    [
        ("paca", {"gate_up_proj.paca_delta", "down_proj.paca_delta"}),
        ("lora", {"base_layer.lora_B.weight", "experts.lora_B.weight"}),
    ],
)
def test_experts_are_trained_beside_the_attention(
    method, trained, make_config, mixtral_dir, tmp_path
):
    options = {"model": {"path": str(mixtral_dir)}, "training": {"max_steps": 2}}
    options[method] = {"r": 2, "target_parameters": BOTH}
    report = train(make_config(method, **options))
    assert report.eval_loss_after < report.eval_loss_before
    assert sum("mlp.experts" in name for name in report.targets) == 4
    assert sum("self_attn" in name for name in report.targets) == 8
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    moved = {name for name, x in tensors.items() if "experts" in name and x.abs().sum() > 0}
    for layer in (0, 1):
        for name in trained:
            assert any(f"layers.{layer}." in one and one.endswith(name) for one in moved)
    reasons = " ".join(report.lean["left"])
    assert "fused experts are not made lean" in reasons
    assert "act(gate(x))" not in reasons


def test_a_name_that_is_no_parameter(make_config, mixtral_dir):
    section = {"target_parameters": ["experts.gate_proj"]}
    config = make_config(model={"path": str(mixtral_dir)}, paca=section)
    refused(r"\['experts.gate_proj'\] match no parameter of Mixtral", config)
