"""What two models differ in."""

import filecmp

import pytest
import torch
from safetensors.torch import save_file

from pacatune import patch
from pacatune.adapters.folder import read_adapter
from pacatune.adapters.merge import merge
from pacatune.patch.difference import changed_columns
from tests.adapters.fixtures import edit_tensors, save_adapter
from tests.patch.conftest import assert_same_columns
from tests.releases import needs

NAME = "model.layers.0.mlp.down_proj.weight"


@pytest.fixture
def changed(single):
    """Change the tensors of a copy of the base; return its folder."""

    def change_copy(change):
        edit_tensors(single / "model.safetensors", change)
        return single

    return change_copy


def assert_gives(base, made, other, folder):
    """See that a patch turns a base into another model."""
    patch.apply_to_folder(base, made, folder)
    assert filecmp.cmp(folder / "model.safetensors", other / "model.safetensors", shallow=False)


def test_two_models_give_the_adapters_patch(bf16_dir, bf16_adapter, bf16_patch, tmp_path):
    merge(str(bf16_dir), bf16_adapter, tmp_path / "merged", verify=False)
    result = patch.diff(bf16_dir, tmp_path / "merged")
    assert result.refusal() is None
    assert len(result.changed) == 6
    assert_same_columns(bf16_patch, result.patch)
    assert_gives(bf16_dir, result.patch, tmp_path / "merged", tmp_path / "out")


def test_rows_and_whole_vectors(bf16_dir, changed, tmp_path):
    def change(tensors):
        tensors["model.embed_tokens.weight"][[3, 7]] += 1
        tensors["model.norm.weight"] *= 2

    other = changed(change)
    made = patch.diff(bf16_dir, other).patch
    assert {columns.dim for columns in made.after.values()} == {0}
    assert made.after["model.embed_tokens.weight"].indices.tolist() == [3, 7]
    assert_gives(bf16_dir, made, other, tmp_path / "out")


@needs("bitsandbytes")
def test_columns_that_were_trained_on_few_bits_by_way_of_the_merge(tiny_model_dir, tmp_path):
    few_bits = {"method": "bitsandbytes", "type": "nf4", "block_size": 64, "double": True}
    options = {"quantization": few_bits, "trainable_token_indices": [3, 5]}
    save_adapter(tiny_model_dir, tmp_path / "a", **options)
    merge(str(tiny_model_dir), tmp_path / "a", tmp_path / "m", verify=False, onto="original")
    made = patch.diff(tiny_model_dir, tmp_path / "m").patch
    columns = {
        f"{n}.weight": one.indices for n, one in read_adapter(tmp_path / "a").modules.items()
    }
    columns["model.embed_tokens.weight"] = torch.tensor([3, 5])
    assert made.after.keys() == columns.keys()
    for name, after in made.after.items():
        assert torch.equal(after.indices, columns[name])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t[NAME].add_(1), "1 tensors differ in more than half of their columns, first"),
        (lambda t: t.pop(NAME), "1 tensors are in the first alone, first"),
        (lambda t: t.update(new=torch.ones(2)), "1 tensors are in the second alone, first 'new'"),
        (lambda t: t.update({NAME: t[NAME].float()}), "1 tensors have another shape or dtype"),
    ],
)
def test_more_than_columns_is_no_patch(bf16_dir, changed, change, message):
    result = patch.diff(bf16_dir, changed(change))
    assert result.patch is None
    assert result.refusal().startswith(message)


def test_packed_numbers_and_single_numbers_are_no_columns(bf16_dir, tmp_path):
    folders = tmp_path / "1", tmp_path / "2"
    for value, folder in enumerate(folders):
        folder.mkdir()
        packed = torch.zeros(4, 8, dtype=torch.uint8)
        packed[0, 0] = value
        save_file({"packed": packed, "single": torch.tensor(value)}, folder / "model.safetensors")
    result = patch.diff(*folders)
    assert result.patch is None
    assert sorted(result.whole) == ["packed", "single"]


@pytest.mark.parametrize(
    ("place", "expected"),
    [
        ((slice(None), slice(None), [1]), (2, [1])),
        ((slice(None), [0, 3]), (1, [0, 3])),
        (([5],), (0, [5])),
    ],
)
def test_columns_are_found_along_the_dimension_with_the_fewest(place, expected):
    before = torch.zeros(6, 5, 4)
    after = before.clone()
    after[place] = 1
    columns, new = changed_columns("a", before, after)
    assert (columns.dim, columns.indices.tolist()) == expected
    assert torch.equal(new, after.index_select(columns.dim, columns.indices))
    assert changed_columns("a", before, before.clone()) is None
    assert changed_columns("a", before, -before) is not None  # 0.0 and -0.0
