"""Model folders: patched copies, and what a patch does not fit."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from pacatune import patch
from pacatune.files.checkpoint import Checkpoint
from pacatune.ops.columns import bits
from pacatune.patch import folder as folder_module
from tests.adapters.fixtures import edit_json, edit_tensors, save_adapter
from tests.conftest import build_model
from tests.patch.conftest import change_of, contents


def test_a_copy_is_patched_and_the_base_left_alone(base, bf16_patch, tmp_path):
    before = contents(base)
    result = patch.apply_to_folder(base, bf16_patch, tmp_path / "out")
    assert contents(base) == before
    assert result.notes == []
    assert bf16_patch.num_bytes < result.page_bytes
    model = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
    patch.apply(model, bf16_patch)
    model.save_pretrained(tmp_path / "expected")
    patched, expected = (Checkpoint.open(tmp_path / name) for name in ("out", "expected"))
    assert patched.entries.keys() == expected.entries.keys()
    for name in patched.entries:
        assert torch.equal(bits(patched.tensor(name)), bits(expected.tensor(name))), name
    patch.apply_to_folder(tmp_path / "out", bf16_patch, tmp_path / "back", revert=True)
    assert contents(tmp_path / "back") == before


def test_files_whose_tensors_are_not_aligned(tmp_path):
    """Other writers than safetensors' own do not pad the header."""
    weight = torch.arange(24.0).view(4, 6)
    raw = json.dumps({"w": {"dtype": "F32", "shape": [4, 6], "data_offsets": [0, 96]}}).encode()
    raw += b" " * (1 - len(raw) % 2)  # an odd length
    path = tmp_path / "model.safetensors"
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + weight.numpy().tobytes())
    patch.apply_in_place(tmp_path, change_of("w", 1, weight, [1, 4], torch.full((4, 2), -1.0)))
    weight[:, [1, 4]] = -1
    assert torch.equal(load_file(path)["w"], weight)


def test_what_comes_along(tiny_model_dir, adapter_dir, tmp_path):
    base = Path(shutil.copytree(tiny_model_dir, tmp_path / "base"))
    (base / "1_Pooling").mkdir()
    (base / "1_Pooling" / "config.json").write_text("{}")
    left_out = {"pytorch_model.bin", "consolidated.safetensors", ".hidden"}
    for name in left_out:
        (base / name).write_text("x")
    made, _ = patch.make(base, adapter_dir)
    result = patch.apply_to_folder(base, made, tmp_path / "out")
    (note,) = result.notes
    assert note.startswith("left out, as they hold the base's weights unpatched: consolidated.s")
    assert contents(base).keys() - contents(tmp_path / "out").keys() == left_out
    AutoTokenizer.from_pretrained(tmp_path / "out")


def test_the_hubs_cache_is_read_through_its_links(bf16_dir, bf16_patch, tmp_path):
    blobs, snapshot = tmp_path / "models--a" / "blobs", tmp_path / "models--a" / "snapshots" / "1"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for path in bf16_dir.iterdir():
        shutil.copy(path, blobs / f"hash-{path.name}")
        (snapshot / path.name).symlink_to(f"../../blobs/hash-{path.name}")
    patch.apply_to_folder(snapshot, bf16_patch, tmp_path / "out")
    assert not any(path.is_symlink() for path in (tmp_path / "out").iterdir())
    before = contents(blobs)
    with pytest.raises(ValueError, match="is a link, or has several names"):
        patch.apply_in_place(snapshot, bf16_patch)
    assert contents(blobs) == before
    (tmp_path / "elsewhere.txt").write_text("private")
    (snapshot / "notes.txt").symlink_to(tmp_path / "elsewhere.txt")
    with pytest.raises(ValueError, match=r"is a link to .*elsewhere.txt, outside of the folder"):
        patch.apply_to_folder(snapshot, bf16_patch, tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_disjoint_patches_go_on_and_off_in_any_order(bf16_dir, single, tmp_path):
    patches, targets = [], ["q_proj", "v_proj"]
    for number, columns in enumerate(([0, 5, 9], [1, 6, 31])):
        options = {"r": 3, "target_modules": targets, "selection": {".*": columns}}
        save_adapter(bf16_dir, tmp_path / str(number), dtype="bfloat16", seed=number, **options)
        patches.append(patch.make(bf16_dir, tmp_path / str(number))[0])
    one, two = patches
    patch.apply_in_place(single, one)
    (note,) = patch.apply_in_place(single, two).notes
    assert note.endswith("differ from its base: another patch is applied, or it is another base.")
    patch.apply_to_folder(bf16_dir, patch.stack([two, one]), tmp_path / "joint")
    assert contents(single) == contents(tmp_path / "joint")
    patch.apply_in_place(single, one, revert=True)
    patch.apply_to_folder(bf16_dir, two, tmp_path / "two")
    assert contents(single) == contents(tmp_path / "two")
    patch.apply_in_place(single, two, revert=True)
    assert contents(single) == contents(bf16_dir)


def test_overlapping_patches_come_off_in_order_only(bf16_dir, single, bf16_patch):
    name, first = next(iter(bf16_patch.before.items()))
    patch.apply_in_place(single, bf16_patch)
    patched = Checkpoint.open(single).tensor(name)
    second = change_of(name, first.dim, patched, [int(first.indices[0])], patched[:, :1] * 3)
    patch.apply_in_place(single, second)
    message = r"1 of 6 tensors.* than the patch replaces\. .* if another .*overlaps"
    with pytest.raises(ValueError, match=message):
        patch.apply_in_place(single, bf16_patch, revert=True)
    patch.apply_in_place(single, second, revert=True)
    patch.apply_in_place(single, bf16_patch, revert=True)
    assert contents(single) == contents(bf16_dir)


# R5: what a patch does not fit, stays as it is.


@pytest.mark.parametrize("num_tensors", [1, 6])
def test_a_base_that_differs_elsewhere_alone(single, bf16_patch, tmp_path, num_tensors):
    """A fine-tune that froze the columns: the patch fits, but what comes out was never trained."""

    def train(tensors):
        for name, own in list(bf16_patch.before.items())[:num_tensors]:
            noise = torch.randn(own.shape, generator=torch.Generator().manual_seed(0)).bfloat16()
            noise[:, own.indices] = tensors[name][:, own.indices]
            tensors[name] = noise

    edit_tensors(single / "model.safetensors", train)
    refused(single, bf16_patch, tmp_path, r"is not the base .* although those it changes are")
    assert patch.apply_in_place(single, bf16_patch, allow_other_base=True).notes


def refused(base, made, tmp_path, message, error=ValueError):
    before = contents(base)
    for write in (patch.apply_in_place, lambda *args: patch.apply_to_folder(*args, tmp_path / "x")):
        with pytest.raises(error, match=message):
            write(base, made)
    assert contents(base) == before
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("options", "dtype", "message"),
    [
        ({"seed": 3}, torch.bfloat16, r"is not the base .*\('my-base'\), .*6 of 6"),
        ({}, torch.float16, r"in torch.float16, but the columns are .* in torch.bfloat16"),
        ({"intermediate_size": 48}, torch.bfloat16, r"\(32, 48\) in .* but the columns"),
        ({"num_hidden_layers": 1}, torch.bfloat16, r"has no tensor '.*1.mlp"),
    ],
)
def test_bases_that_a_patch_does_not_fit(bf16_patch, tmp_path, options, dtype, message):
    build_model(300, **options).to(dtype).save_pretrained(tmp_path / "base")
    refused(tmp_path / "base", bf16_patch, tmp_path, message)


INDEX = "model.safetensors.index.json"


def truncate(base):
    path = next(base.glob("*.safetensors"))
    path.write_bytes(path.read_bytes()[:-5])


def repeat(base):
    """Have two files of the same tensors."""
    shutil.copy(min(base.glob("*.safetensors")), base / "twice.safetensors")
    name_file(b="twice.safetensors")(base)


def name_file(**names):
    def change(base):
        known = json.loads((base / INDEX).read_text())["weight_map"]
        edit_json(base / INDEX, weight_map=known | names)

    return change


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (truncate, ValueError, "is truncated or no safetensors file"),
        (repeat, ValueError, "only one of them can be the model's"),
        (name_file(a="../base/model.safetensors"), ValueError, "must be a plain name that ends"),
        (name_file(a="model.bin"), ValueError, "must be a plain name that ends with"),
        (name_file(b="lost.safetensors"), FileNotFoundError, "has no lost.safetensors, which its"),
        (lambda base: edit_json(base / INDEX, weight_map={}), ValueError, "has no `weight_map`"),
    ],
)
def test_damaged_folders_are_refused(sharded_dir, bf16_patch, tmp_path, damage, error, message):
    base = Path(shutil.copytree(sharded_dir, tmp_path / "base"))
    damage(base)
    refused(base, bf16_patch, tmp_path, message, error)


def test_folders_that_are_no_models_in_safetensors(bf16_patch, tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        patch.apply_in_place(tmp_path / "nowhere", bf16_patch)
    os.mkfifo(tmp_path / "model.safetensors.index.json")  # is no index
    with pytest.raises(FileNotFoundError, match=r"has neither model.safetensors nor"):
        patch.apply_in_place(tmp_path, bf16_patch)


def test_what_was_written_is_read_back(bf16_dir, bf16_patch, tmp_path, monkeypatch):
    monkeypatch.setattr(folder_module, "_write", lambda *args: None)
    with pytest.raises(ValueError, match="was not written as it should be; nothing was left"):
        patch.apply_to_folder(bf16_dir, bf16_patch, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
