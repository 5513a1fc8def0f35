"""Patches in memory: on and off again bit for bit, or refused before anything is written."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM

from pacatune import patch
from pacatune.ops.columns import bits
from pacatune.patch import Patch, WeightColumns, memory
from tests.patch.conftest import change_of
from tests.sync.conftest import assert_bits, clone

NAME = "model.layers.0.mlp.down_proj.weight"


@pytest.fixture
def model(bf16_dir):
    return AutoModelForCausalLM.from_pretrained(bf16_dir, dtype="auto").eval()


@pytest.fixture
def unchanged(model):
    """The model, which the test leaves as it was: the same parameters, with the same bits."""
    before, kept = clone(model), dict(model.named_parameters())
    yield model
    assert_bits(model, before)
    assert all(parameter is kept[name] for name, parameter in model.named_parameters())


def test_bits_are_moved_not_numbers():
    odd = torch.tensor([[-0.0, float("nan")], [float("inf"), 1e-45]])
    weight = torch.tensor([[0.0, float("nan"), 2.0], [1.0, -0.0, 3.0]])
    made = change_of("w", 1, weight, [0, 1], odd)
    tensors = {"w": weight.clone()}
    patch.apply(tensors, made)
    assert torch.equal(bits(tensors["w"][:, :2].contiguous()), bits(odd))
    patch.revert(tensors, made)
    assert torch.equal(bits(tensors["w"]), bits(weight))
    tensors["w"][0, 0] = -0.0  # equal as a number, not as bits
    with pytest.raises(ValueError, match="do not hold the base's columns"):
        patch.apply(tensors, made)


def test_what_is_there_is_compared_before_anything_is_written(unchanged, bf16_patch):
    with pytest.raises(ValueError, match=r"6 of 6 tensors, .* the patch's columns; is it applied"):
        patch.revert(unchanged, bf16_patch)
    weight, column = unchanged.get_parameter(NAME), bf16_patch.before[NAME].indices[0]
    with torch.no_grad():
        before = weight[3, column].clone()
        weight[3, column] += 1
        changed = clone(unchanged)
        with pytest.raises(ValueError, match=r"1 of 6 tensors, first .*nothing was written"):
            patch.apply(unchanged, bf16_patch)
        assert_bits(unchanged, changed)
        weight[3, column] = before
    patch.apply(unchanged, bf16_patch)
    applied = clone(unchanged)
    with pytest.raises(ValueError, match="do not hold the base's columns"):
        patch.apply(unchanged, bf16_patch)
    assert_bits(unchanged, applied)
    patch.revert(unchanged, bf16_patch)


def test_an_interrupted_write_is_taken_back(unchanged, bf16_patch, monkeypatch):
    write, calls = memory.Place.write, []

    def interrupted(place, columns):
        calls.append(place)
        if len(calls) == 4:
            write(place, columns.roll(1, 0))  # half of it, say
            raise KeyboardInterrupt
        write(place, columns)

    monkeypatch.setattr(memory.Place, "write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        patch.apply(unchanged, bf16_patch)


def test_graphs_of_the_old_columns_refuse_to_go_back(model, bf16_patch):
    """R3, for patches."""
    x = torch.randn(3, 64, dtype=torch.bfloat16, requires_grad=True)
    y = nn.functional.linear(x, model.get_parameter(NAME))
    patch.apply(model, bf16_patch)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_a_model_with_an_adapter_is_refused(unchanged, bf16_patch, bf16_adapter):
    adapted = PeftModel.from_pretrained(unchanged, bf16_adapter, is_trainable=True)
    adapted(torch.arange(128).view(1, 128))  # the columns are resident now
    for one in (adapted, unchanged):
        with pytest.raises(ValueError, match=r"down_proj' has an adapter, .* unload the adapter"):
            patch.apply(one, bf16_patch)
    plain = adapted.unload()
    patch.apply(plain, bf16_patch)
    patch.revert(plain, bf16_patch)
    # A merged adapter is reverted as a patch.
    merged = PeftModel.from_pretrained(unchanged, bf16_adapter).merge_and_unload()
    patch.revert(merged, bf16_patch)
    assert merged is unchanged


def test_adapters_of_other_modules_do_not_matter(model, bf16_patch):
    patch.apply(get_peft_model(model, LoraConfig(target_modules=["gate_proj"])), bf16_patch)


class Sharded:
    placements = ()


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({NAME: torch.zeros(32, 64)}, r"torch\.float32, but .* for .*in that dtype"),
        ({NAME: torch.zeros(32, 64, dtype=torch.bfloat16, device="meta")}, "is on the meta"),
        ({NAME: torch.zeros(32, 128)}, r"\(32, 128\) .* but the columns are for \(32, 64\)"),
        ({NAME: Sharded()}, "is sharded over processes"),
    ],
)
def test_models_that_a_patch_does_not_fit(tensors, message, bf16_patch):
    one = Patch.of([(bf16_patch.before[NAME], bf16_patch.after[NAME].values)])
    with pytest.raises(ValueError, match=message):
        patch.apply(tensors, one)


def test_tied_tensors_that_a_patch_changes_apart_are_refused():
    weight = torch.zeros(4, 6)
    columns = [
        WeightColumns.of(name, 1, weight, torch.tensor([column]))
        for name, column in (("a", 1), ("b", 2))
    ]
    made = Patch.of((before, torch.ones(4, 1)) for before in columns)
    with pytest.raises(ValueError, match="'a' and 'b' are one tensor in this model"):
        patch.apply({"a": weight, "b": weight}, made)
    assert weight.sum() == 0
    patch.apply({"a": weight, "b": weight.clone()}, made)
