import copy
import subprocess
import sys

import pytest
import torch
from peft import PeftModel
from torch import nn
from transformers import AutoModelForCausalLM

from pacatune import patch
from pacatune.patch import Patch, edit_of, memory
from pacatune.patch.edit import bits
from tests.conftest import build_model

NAME = "model.layers.0.mlp.down_proj.weight"


@pytest.fixture
def model(bf16_dir):
    return AutoModelForCausalLM.from_pretrained(bf16_dir, dtype="auto").eval()


def bits_of(model):
    return {name: bits(tensor.detach().clone()) for name, tensor in model.state_dict().items()}


def assert_bits(model, expected):
    found = bits_of(model)
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert torch.equal(tensor, expected[name]), name


def test_applied_and_reverted_bit_for_bit(model, bf16_dir, bf16_patch, tmp_path):
    before = bits_of(model)
    kept = dict(model.named_parameters())
    for _ in range(3):
        patch.apply(model, bf16_patch)
        patched = bits_of(model)
        patch.revert(model, bf16_patch)
        assert_bits(model, before)
    assert all(parameter is kept[name] for name, parameter in model.named_parameters())
    patch.apply_to_folder(bf16_dir, bf16_patch, tmp_path / "out")
    written = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert_bits(written, patched)


def test_a_dictionary_of_tensors(model, bf16_patch):
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    patch.apply(tensors, bf16_patch)
    patch.apply(model, bf16_patch)
    assert_bits(model, {name: bits(tensor) for name, tensor in tensors.items()})


def test_bits_are_moved_not_numbers():
    odd = torch.tensor([[-0.0, float("nan")], [float("inf"), 1e-45]])
    weight = torch.tensor([[0.0, float("nan"), 2.0], [1.0, -0.0, 3.0]])
    indices = torch.tensor([0, 1])
    made = Patch(edits={"w": edit_of("w", 1, weight, indices, odd)})
    tensors = {"w": weight.clone()}
    patch.apply(tensors, made)
    assert torch.equal(bits(tensors["w"][:, :2].contiguous()), bits(odd))
    patch.revert(tensors, made)
    assert torch.equal(bits(tensors["w"]), bits(weight))
    tensors["w"][0, 0] = -0.0  # equal as a number, not as bits
    with pytest.raises(ValueError, match="do not hold the base's columns"):
        patch.apply(tensors, made)


def test_what_is_there_is_compared_before_anything_is_written(model, bf16_patch):
    before = bits_of(model)
    with pytest.raises(ValueError, match=r"6 of 6 tensors, .* the patch's columns; is it applied"):
        patch.revert(model, bf16_patch)
    with torch.no_grad():
        column = bf16_patch.edits[NAME].indices[0]
        model.get_parameter(NAME)[3, column] += 1
    changed = bits_of(model)
    with pytest.raises(ValueError, match=r"1 of 6 tensors, first .*nothing was written"):
        patch.apply(model, bf16_patch)
    assert_bits(model, changed)
    with torch.no_grad():
        model.get_parameter(NAME).copy_(before[NAME].view(torch.bfloat16))
    patch.apply(model, bf16_patch)
    applied = bits_of(model)
    with pytest.raises(ValueError, match="do not hold the base's columns"):
        patch.apply(model, bf16_patch)
    assert_bits(model, applied)


def test_an_interrupted_write_is_taken_back(model, bf16_patch, monkeypatch):
    before, write, calls = bits_of(model), memory.Place.write, []

    def interrupted(place, columns):
        calls.append(place)
        if len(calls) == 4:
            write(place, columns.roll(1, 0))  # half of it, say
            raise KeyboardInterrupt
        write(place, columns)

    monkeypatch.setattr(memory.Place, "write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        patch.apply(model, bf16_patch)
    assert_bits(model, before)


def test_a_model_with_an_adapter_is_refused(model, bf16_patch, bf16_adapter):
    before = bits_of(model)
    adapted = PeftModel.from_pretrained(model, bf16_adapter, is_trainable=True)
    adapted(torch.arange(128).view(1, 128))  # the columns are resident now
    for one in (adapted, model):
        with pytest.raises(ValueError, match=r"down_proj' has an adapter, .* unload the adapter"):
            patch.apply(one, bf16_patch)
    plain = adapted.unload()
    patch.apply(plain, bf16_patch)
    patch.revert(plain, bf16_patch)
    assert_bits(plain, before)


def test_a_merged_adapter_is_reverted_as_a_patch(model, bf16_patch, bf16_adapter):
    before = bits_of(model)
    merged = PeftModel.from_pretrained(model, bf16_adapter).merge_and_unload()
    patch.revert(merged, bf16_patch)
    assert_bits(merged, before)


def test_adapters_of_other_modules_do_not_matter(bf16_dir, model, bf16_patch):
    from peft import LoraConfig, get_peft_model

    adapted = get_peft_model(model, LoraConfig(target_modules=["gate_proj"]))
    patch.apply(adapted, bf16_patch)
    patch.revert(adapted, bf16_patch)


def test_graphs_of_the_old_columns_refuse_to_go_back(model, bf16_patch):
    x = torch.randn(3, 64, dtype=torch.bfloat16, requires_grad=True)
    y = nn.functional.linear(x, model.get_parameter(NAME))
    patch.apply(model, bf16_patch)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_tensors_of_inference_mode():
    with torch.inference_mode():
        tensors = {"w": torch.zeros(4, 6)}
    edit = edit_of("w", 1, torch.zeros(4, 6), torch.tensor([2]), torch.ones(4, 1))
    patch.apply(tensors, Patch(edits={"w": edit}))
    assert tensors["w"].sum() == 4


def test_models_that_a_patch_does_not_fit(model, bf16_patch, bf16_dir):
    with pytest.raises(
        ValueError, match=r"torch\.float32, but the columns are for .*in that dtype"
    ):
        patch.apply(copy.deepcopy(model).float(), bf16_patch)
    with pytest.raises(ValueError, match="is on the meta device"):
        patch.apply(copy.deepcopy(model).to("meta"), bf16_patch)
    with pytest.raises(ValueError, match=r"has no tensor '.*'; the nearest is"):
        patch.apply({"other": torch.zeros(1)}, bf16_patch)
    with pytest.raises(ValueError, match=r"\(32, 128\) .* but the columns are for \(32, 64\)"):
        patch.apply(build_model(300, intermediate_size=128).bfloat16(), bf16_patch)


def test_tied_tensors_that_a_patch_changes_apart_are_refused():
    weight = torch.zeros(4, 6)
    edits = {
        name: edit_of(name, 1, weight, torch.tensor([column]), torch.ones(4, 1))
        for name, column in (("a", 1), ("b", 2))
    }
    with pytest.raises(ValueError, match="'a' and 'b' are one tensor in this model"):
        patch.apply({"a": weight, "b": weight}, Patch(edits=edits))
    assert weight.sum() == 0
    patch.apply({"a": weight, "b": weight.clone()}, Patch(edits=edits))


def test_sharded_tensors_are_refused(bf16_patch):
    class Sharded:
        placements = ()

    with pytest.raises(ValueError, match="is sharded over processes"):
        patch.apply(dict.fromkeys(bf16_patch.edits, Sharded()), bf16_patch)


def test_a_patch_in_memory_waits_for_neither_peft_nor_transformers():
    code = (
        "import sys\n"
        "from pacatune import patch\n"
        "heavy = {'peft', 'transformers', 'accelerate'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
