import filecmp
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from pacatune import patch
from pacatune.adapters.folder import read_adapter
from pacatune.adapters.merge import merge
from pacatune.patch.difference import changed_columns
from tests.adapters.fixtures import save_adapter
from tests.conftest import build_model
from tests.releases import needs

NAME = "model.layers.0.mlp.down_proj.weight"


def changed_copy(base, folder, change):
    """Copy a model and change its tensors."""
    shutil.copytree(base, folder)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_two_models_give_the_adapters_patch(bf16_dir, bf16_adapter, bf16_patch, tmp_path):
    merge(str(bf16_dir), bf16_adapter, tmp_path / "merged", verify=False)
    result = patch.diff(bf16_dir, tmp_path / "merged")
    assert result.refusal() is None
    assert len(result.changed) == 6
    same = patch.compare_patches(bf16_patch, result.patch)
    assert (same.only_a, same.only_b, same.differing) == ([], [], [])
    assert sum(same.shared_columns.values()) == 24
    patch.apply_to_folder(bf16_dir, result.patch, tmp_path / "out")
    assert filecmp.cmp(
        tmp_path / "out/model.safetensors", tmp_path / "merged/model.safetensors", shallow=False
    )
    assert patch.diff(bf16_dir, bf16_dir).refusal() == "they are equal"


def test_rows_and_biases_and_whole_vectors(bf16_dir, tmp_path):
    def change(tensors):
        tensors["model.embed_tokens.weight"][[3, 7]] += 1
        tensors["model.norm.weight"] *= 2

    other = changed_copy(bf16_dir, tmp_path / "other", change)
    made = patch.diff(bf16_dir, other).patch
    assert {name: edit.dim for name, edit in made.edits.items()} == {
        "model.embed_tokens.weight": 0,
        "model.norm.weight": 0,
    }
    assert made.edits["model.embed_tokens.weight"].indices.tolist() == [3, 7]
    patch.apply_to_folder(bf16_dir, made, tmp_path / "out")
    assert filecmp.cmp(
        tmp_path / "out/model.safetensors", other / "model.safetensors", shallow=False
    )


def test_tokens_and_biases_of_an_adapter_by_way_of_the_merge(bf16_dir, tmp_path):
    save_adapter(bf16_dir, tmp_path / "a", dtype="bfloat16", trainable_token_indices=[3, 5])
    merge(str(bf16_dir), tmp_path / "a", tmp_path / "merged", verify=False)
    made = patch.diff(bf16_dir, tmp_path / "merged").patch
    assert made.edits["model.embed_tokens.weight"].indices.tolist() == [3, 5]


@needs("bitsandbytes")
def test_columns_that_were_trained_on_few_bits_by_way_of_the_merge(tiny_model_dir, tmp_path):
    few_bits = {"method": "bitsandbytes", "type": "nf4", "block_size": 64, "double": True}
    save_adapter(tiny_model_dir, tmp_path / "a", quantization=few_bits)
    with pytest.raises(ValueError, match="--base original"):
        patch.make(tiny_model_dir, tmp_path / "a")
    merge(str(tiny_model_dir), tmp_path / "a", tmp_path / "m", verify=False, onto="original")
    made = patch.diff(tiny_model_dir, tmp_path / "m").patch
    columns = read_adapter(tmp_path / "a").modules
    assert made.edits.keys() == {f"{module}.weight" for module in columns}
    for name, edit in made.edits.items():
        assert torch.equal(edit.indices, columns[name.removesuffix(".weight")].indices)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t[NAME].add_(1), "1 tensors differ in more than half of their columns, first"),
        (lambda t: t.pop(NAME), "1 tensors are in the first alone, first"),
        (lambda t: t.update(new=torch.ones(2)), "1 tensors are in the second alone, first 'new'"),
        (lambda t: t.update({NAME: t[NAME].float()}), "1 tensors have another shape or dtype"),
        (lambda t: t.update({NAME: t[NAME][:4].clone()}), "1 tensors have another shape or dtype"),
    ],
)
def test_more_than_columns_is_no_patch(bf16_dir, tmp_path, change, message):
    result = patch.diff(bf16_dir, changed_copy(bf16_dir, tmp_path / "other", change))
    assert result.patch is None
    assert result.refusal().startswith(message)


def test_packed_numbers_and_single_numbers_are_no_columns(bf16_dir, tmp_path):
    def packed(value):
        def change(tensors):
            tensors["packed"] = torch.zeros(4, 8, dtype=torch.uint8)
            tensors["packed"][0, 0] = value
            tensors["single"] = torch.tensor(float(value))

        return change

    one, other = (changed_copy(bf16_dir, tmp_path / str(n), packed(n)) for n in (1, 2))
    result = patch.diff(one, other)
    assert result.patch is None
    assert sorted(result.whole) == ["packed", "single"]


def test_columns_are_found_along_the_dimension_with_the_fewest():
    before = torch.zeros(6, 5, 4)
    for place, dim, columns in (
        ((slice(None), slice(None), [1]), 2, [1]),
        ((slice(None), [0, 3]), 1, [0, 3]),
        (([5],), 0, [5]),
    ):
        after = before.clone()
        after[place] = 1
        found_dim, found = changed_columns(before, after)
        assert (found_dim, found.tolist()) == (dim, columns)
    assert changed_columns(before, before.clone()) is None
    assert changed_columns(before, -before) is not None  # 0.0 and -0.0


def test_patches_are_compared(bf16_dir, bf16_patch, tmp_path):
    save_adapter(bf16_dir, tmp_path / "a", dtype="bfloat16", seed=1, target_modules=["q_proj"])
    other, _ = patch.make(bf16_dir, tmp_path / "a")
    result = patch.compare_patches(bf16_patch, other)
    assert len(result.only_a) == 4
    assert result.only_b == []
    assert result.num_shared_tensors == len(result.differing) == 2
    assert sum(result.shared_columns.values()) == 8


def test_a_model_of_other_sizes(bf16_dir, tmp_path):
    build_model(300, num_hidden_layers=1).bfloat16().save_pretrained(tmp_path / "other")
    result = patch.diff(bf16_dir, tmp_path / "other")
    assert "are in the first alone" in result.refusal()
    assert len(result.only_a) == 9
    with pytest.raises(FileNotFoundError, match="has neither"):
        patch.diff(bf16_dir, Path(tmp_path))
