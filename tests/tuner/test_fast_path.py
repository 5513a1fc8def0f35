"""Torch's attention and encoders read weights without calling a layer: neither is passed by."""

import copy
import logging

import pytest
import torch
from peft import PeftModel
from torch import nn

from tests.releases import needs
from tests.tuner.nets import adapt, layers

SIZE, LENGTH, BATCH = 12, 5, 3


def encoder() -> nn.Module:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(SIZE, 4, 16, batch_first=True, dtype=torch.float64)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=True).eval()


@needs("peft", "0.21")  # `layers_pattern` at the start of a name
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.parametrize("is_padded", [True, False])
def test_fused_inference_does_not_pass_by_the_adapter(is_padded: bool) -> None:
    base = encoder()
    options = {"layers_to_transform": [1], "layers_pattern": "layers"}
    model = adapt(base, target_modules=["linear1"], **options).eval()
    x = torch.randn(BATCH, LENGTH, SIZE, dtype=torch.float64)
    padding = torch.arange(LENGTH) >= torch.tensor([[5], [3], [4]]) if is_padded else None
    with_gradients = model(x, src_key_padding_mask=padding)
    with torch.no_grad():
        merged = copy.deepcopy(model).merge_and_unload()
        y, plain, want = (m(x, src_key_padding_mask=padding) for m in (model, base, merged))
    valid = ~padding if is_padded else torch.ones(BATCH, LENGTH, dtype=torch.bool)
    torch.testing.assert_close(y[valid], with_gradients[valid])
    torch.testing.assert_close(y[valid], want[valid])
    assert not torch.allclose(y[valid], plain[valid], atol=1e-3)
    assert merged.use_nested_tensor is True
    assert merged.layers[1].activation_relu_or_gelu == base.layers[1].activation_relu_or_gelu


@pytest.mark.parametrize("excluded", [None, ["linear2"], r".*\.linear2"])
def test_all_linear_leaves_out_what_torchs_attention_never_calls(
    excluded: list[str] | str | None, tmp_path
) -> None:
    model = adapt(encoder(), target_modules="all-linear", exclude_modules=excluded)
    names = ["linear1"] if excluded else ["linear1", "linear2"]
    wanted = {f"layers.{i}.{name}" for i in range(2) for name in names}
    assert set(layers(model)) == wanted
    model.save_pretrained(tmp_path)
    assert set(layers(PeftModel.from_pretrained(encoder(), tmp_path))) == wanted


def test_what_is_left_out_is_said(caplog) -> None:
    base = nn.ModuleDict({"said_once": encoder()})
    with caplog.at_level(logging.WARNING):
        adapt(base, target_modules="all-linear")
    assert "'said_once.layers.0.self_attn.out_proj'" in caplog.text
    assert "left out: torch.nn.MultiheadAttention reads its weights and never" in caplog.text
