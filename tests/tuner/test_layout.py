"""Where the columns of each kind of weight are, held against `dense` updates in plain indexing."""

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from pacatune.adapters.target import target_of_module
from pacatune.tuner.layout import layout_of


class Experts(nn.Module):
    def __init__(self, is_transposed):
        super().__init__()
        self.has_gate, self.is_transposed = True, is_transposed
        shape = (3, 4, 6) if is_transposed else (3, 6, 4)
        self.down_proj = nn.Parameter(torch.randn(shape))


class Llama4TextExperts(nn.Module):
    def __init__(self):
        super().__init__()
        self.down_proj = nn.Parameter(torch.randn(3, 4, 6))


# module, name of the weight, shape in a file, shape of a layer's update of two columns
KINDS = {
    "linear": (nn.Linear(4, 6), "weight", (6, 4), (6, 2)),
    "conv1d_of_transformers": (Conv1D(6, 4), "weight", (6, 4), (6, 2)),
    "conv1d": (nn.Conv1d(4, 6, 3), "weight", (6, 4, 3), (6, 2, 3)),
    "grouped": (nn.Conv2d(4, 8, (3, 5), groups=2), "weight", (4, 4, 3, 5), (4, 2, 3, 5)),
    "depthwise": (nn.Conv2d(4, 8, 3, groups=4), "weight", (2, 4, 3, 3), (2, 2, 3, 3)),
    "embedding": (nn.Embedding(9, 4), "weight", (9, 4), (9, 2)),
    "experts": (Experts(False), "down_proj", (6, 4, 3), (3, 6, 2)),
    "experts_transposed": (Experts(True), "down_proj", (6, 4, 3), (3, 6, 2)),
    "experts_of_llama4": (Llama4TextExperts(), "down_proj", (6, 4, 3), (3, 6, 2)),
}
kinds = pytest.mark.parametrize("kind", KINDS)


def weight_and_layout(kind):
    module, name, *_ = KINDS[kind]
    return getattr(module, name).detach().clone(), layout_of(module, name)


@kinds
def test_shapes(kind):
    *_, in_file, of_delta = KINDS[kind]
    _, layout = weight_and_layout(kind)
    assert layout.file_shape == in_file
    assert layout.in_features == 4
    assert layout.delta_shape(2) == of_delta
    assert layout.delta_shape(2)[layout.delta_dim] == 2
    update = torch.randn(in_file[0], 2, *in_file[2:])
    delta = layout.from_file(update)
    assert delta.shape == of_delta
    back = delta.permute(1, 2, 0) if kind.startswith("experts") else delta
    assert back.equal(update)


@kinds
def test_columns_are_those_of_the_matrix(kind):
    weight, layout = weight_and_layout(kind)
    given = torch.tensor([1, 3])
    columns = layout.read_columns(weight, given)
    assert layout.oriented(columns).shape == layout.delta_shape(2)
    changed = weight.clone()
    layout.put_columns_(changed, given, columns + 1)
    matrix, expected = layout.matrix(changed), layout.matrix(weight).clone()
    assert expected.shape[1] == layout.in_features
    expected[:, given] += 1
    torch.testing.assert_close(matrix, expected, rtol=0, atol=0)
    layout.put_columns_(changed, given, columns)
    assert changed.equal(weight)


@kinds
def test_the_dense_shape_turned_is_that_of_the_weight(kind):
    weight, layout = weight_and_layout(kind)
    assert layout.oriented(torch.empty(layout.dense_shape)).shape == weight.shape
    first = layout.first_matrix(weight)
    assert first.equal(layout.matrix(weight)[: len(first)])
    num_experts = getattr(layout, "num_experts", 1)
    assert len(first) * num_experts == len(layout.matrix(weight))


@pytest.mark.parametrize(
    ("module", "names"),
    [
        (nn.LayerNorm(3), ["weight"]),
        (nn.MultiheadAttention(4, 2), ["weight", "in_proj_weight"]),
        (nn.ConvTranspose2d(4, 8, 3), ["weight"]),
        (nn.Linear(3, 5), ["bias", "down_proj"]),
        (Experts(False), ["router"]),
    ],
)
def test_what_has_no_layout(module, names):
    assert [layout_of(module, name) for name in names] == [None] * len(names)


def test_a_layer_of_peft_has_that_of_its_base():
    config = LoraConfig(target_modules=["0"])
    model = inject_adapter_in_model(config, nn.Sequential(nn.Linear(3, 5)))
    assert target_of_module(model, "0").layout.file_shape == (5, 3)
    with pytest.raises(ValueError, match=r"has no module '1'; the nearest name is"):
        target_of_module(model, "1")
