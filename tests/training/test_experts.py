"""A run that trains the fused weights of experts."""

import pytest
import torch
from safetensors.torch import load_file

from pacatune.training import LoraSection, PacaSection, train
from tests.tuner.moe import BOTH, build


@pytest.fixture(scope="module")
def mixtral_dir(tmp_path_factory, tiny_tokenizer):
    folder = tmp_path_factory.mktemp("tiny-mixtral")
    build("mixtral", dtype=torch.float32, vocab_size=len(tiny_tokenizer)).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("method", "section", "trained"),
    [
        ("paca", PacaSection, {"gate_up_proj.paca_delta", "down_proj.paca_delta"}),
        ("lora", LoraSection, {"base_layer.lora_B.weight", "experts.lora_B.weight"}),
    ],
)
def test_experts_are_trained_beside_the_attention(
    method, section, trained, make_config, mixtral_dir, tmp_path
):
    config = make_config(
        method,
        model={"path": str(mixtral_dir)},
        training={"output_dir": str(tmp_path / "run"), "max_steps": 2},
        **{method: section(r=2, target_parameters=BOTH)},
    )
    report = train(config)
    assert report.eval_loss_after < report.eval_loss_before
    assert sum("mlp.experts" in name for name in report.targets) == 4
    assert sum("self_attn" in name for name in report.targets) == 8
    tensors = load_file(tmp_path / "run" / "adapter_model.safetensors")
    moved = {name for name, x in tensors.items() if "experts" in name and x.abs().sum() > 0}
    for layer in (0, 1):
        for name in trained:
            assert any(f"layers.{layer}." in one and one.endswith(name) for one in moved)
    reasons = " ".join(report.lean["left"])
    assert "fused experts are not made lean" in reasons
    assert "act(gate(x))" not in reasons


def test_a_name_that_is_no_parameter(make_config, mixtral_dir):
    section = PacaSection(target_parameters=["experts.gate_proj"])
    with pytest.raises(ValueError, match=r"\['experts.gate_proj'\] match no parameter of Mixtral"):
        train(make_config(model={"path": str(mixtral_dir)}, paca=section))
