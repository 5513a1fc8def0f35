"""Model folders: patched copies, and what a patch does not fit."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from pacatune import patch
from pacatune.files.checkpoint import Checkpoint
from pacatune.patch import Patch, edit_of
from pacatune.patch import folder as folder_module
from tests.conftest import build_model
from tests.patch.folders import assert_same_files, contents, names_of


def test_a_copy_is_patched_and_the_base_left_alone(base, bf16_patch, tmp_path):
    before = contents(base)
    result = patch.apply_to_folder(base, bf16_patch, tmp_path / "out")
    assert contents(base) == before
    assert (result.num_tensors, result.num_columns, result.notes) == (6, 24, [])
    assert result.column_bytes == bf16_patch.num_bytes < result.page_bytes
    assert result.page_bytes % 4096 == 0
    assert names_of(tmp_path / "out") == names_of(base)
    model = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
    patch.apply(model, bf16_patch)
    written = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, written.get_parameter(name))
    patch.apply_to_folder(tmp_path / "out", bf16_patch, tmp_path / "back", revert=True)
    assert_same_files(tmp_path / "back", base)


@pytest.mark.parametrize("header", [b"{}", b'{"__metadata__":{"a":"b"}}'])
def test_files_whose_tensors_are_not_aligned(tmp_path, header):
    """Other writers than safetensors' own do not pad the header."""
    weight = torch.arange(24.0).view(4, 6)
    text = json.loads(header) | {"w": {"dtype": "F32", "shape": [4, 6], "data_offsets": [0, 96]}}
    raw = json.dumps(text).encode()
    raw += b" " * (1 - len(raw) % 2)  # an odd length
    (tmp_path / "m").mkdir()
    path = tmp_path / "m" / "model.safetensors"
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + weight.numpy().tobytes())
    edit = edit_of("w", 1, weight, torch.tensor([1, 4]), torch.full((4, 2), -1.0))
    patch.apply_in_place(tmp_path / "m", Patch(edits={"w": edit}))
    weight[:, [1, 4]] = -1
    assert torch.equal(load_file(path)["w"], weight)


def test_what_comes_along(tiny_model_dir, adapter_dir, tmp_path):
    base = Path(shutil.copytree(tiny_model_dir, tmp_path / "base"))
    (base / "1_Pooling").mkdir()
    (base / "1_Pooling" / "config.json").write_text("{}")
    for name in ("pytorch_model.bin", "consolidated.safetensors", ".hidden"):
        (base / name).write_text("x")
    made, _ = patch.make(base, adapter_dir)
    result = patch.apply_to_folder(base, made, tmp_path / "out")
    assert result.notes == [
        "left out, as they hold the base's weights unpatched: consolidated.safetensors, "
        "pytorch_model.bin."
    ]
    left_out = {"pytorch_model.bin", "consolidated.safetensors", ".hidden"}
    assert set(names_of(base)) - set(names_of(tmp_path / "out")) == left_out
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
    (snapshot / "notes.txt").symlink_to(tmp_path / "elsewhere.txt")
    (tmp_path / "elsewhere.txt").write_text("private")
    with pytest.raises(ValueError, match=r"is a link to .*elsewhere.txt, outside of the folder"):
        patch.apply_to_folder(snapshot, bf16_patch, tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_disjoint_patches_go_on_and_off_in_any_order(bf16_dir, tmp_path):
    from tests.adapters.fixtures import save_adapter

    base = Path(shutil.copytree(bf16_dir, tmp_path / "base"))
    before, patches = contents(base), []
    for number, columns in enumerate(([0, 5, 9], [1, 6, 31])):
        save_adapter(
            bf16_dir,
            tmp_path / str(number),
            dtype="bfloat16",
            seed=number,
            r=3,
            target_modules=["q_proj", "v_proj"],
            selection={".*": columns},
        )
        patches.append(patch.make(bf16_dir, tmp_path / str(number))[0])
    one, two = patches
    patch.apply_in_place(base, one)
    (note,) = patch.apply_in_place(base, two).notes
    assert note.endswith("differ from its base: another patch is applied, or it is another base.")
    patch.apply_to_folder(bf16_dir, patch.stack([two, one]), tmp_path / "joint")
    both = contents(base)
    assert both == contents(tmp_path / "joint")
    patch.apply_in_place(base, one, revert=True)
    patch.apply_to_folder(bf16_dir, two, tmp_path / "two")
    assert contents(base) == contents(tmp_path / "two")
    patch.apply_in_place(base, two, revert=True)
    assert contents(base) == before


def test_overlapping_patches_come_off_in_order_only(bf16_dir, bf16_patch, tmp_path):
    base = Path(shutil.copytree(bf16_dir, tmp_path / "base"))
    name, first = next(iter(bf16_patch.edits.items()))
    patch.apply_in_place(base, bf16_patch)
    patched = Checkpoint.open(base).tensor(name)
    over = edit_of(name, first.dim, patched, first.indices[:1], patched[:, :1] * 3)
    second = Patch(edits={name: over})
    patch.apply_in_place(base, second)
    with pytest.raises(
        ValueError, match=r"1 of 6 tensors.* than the patch replaces\. .* if another .*overlaps"
    ):
        patch.apply_in_place(base, bf16_patch, revert=True)
    patch.apply_in_place(base, second, revert=True)
    patch.apply_in_place(base, bf16_patch, revert=True)
    assert contents(base) == contents(bf16_dir)


def test_a_base_that_differs_elsewhere_alone(bf16_dir, bf16_patch, tmp_path):
    """A fine-tune that froze the columns: the patch fits, but what comes out was never trained."""
    other = Path(shutil.copytree(bf16_dir, tmp_path / "other"))
    tensors = load_file(other / "model.safetensors")
    for name, edit in bf16_patch.edits.items():
        noise = torch.randn(edit.shape, generator=torch.Generator().manual_seed(0)).bfloat16()
        noise[:, edit.indices] = tensors[name][:, edit.indices]
        tensors[name] = noise
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    before = contents(other)
    for write in (patch.apply_in_place, lambda *args: patch.apply_to_folder(*args, tmp_path / "x")):
        with pytest.raises(ValueError, match=r"is not the base .* although those it changes are"):
            write(other, bf16_patch)
    assert contents(other) == before
    assert not (tmp_path / "x").exists()
    assert patch.apply_in_place(other, bf16_patch, allow_other_base=True).notes


def test_bases_that_a_patch_does_not_fit(bf16_patch, tmp_path):
    for name, model, message in (
        ("seed", build_model(300, seed=3).bfloat16(), r"is not the base .*\('my-base'\), .*6 of 6"),
        (
            "dtype",
            build_model(300).half(),
            r"in torch.float16, but the columns are .* in torch.bfloat16",
        ),
        (
            "sizes",
            build_model(300, intermediate_size=48).bfloat16(),
            r"\(32, 48\) in .* but the columns",
        ),
        ("layers", build_model(300, num_hidden_layers=1).bfloat16(), "has no tensor '.*1.mlp"),
    ):
        base = tmp_path / name
        model.save_pretrained(base)
        before = contents(base)
        with pytest.raises(ValueError, match=message):
            patch.apply_in_place(base, bf16_patch)
        with pytest.raises(ValueError, match=message):
            patch.apply_to_folder(base, bf16_patch, tmp_path / "out")
        assert contents(base) == before
        assert not (tmp_path / "out").exists()


def test_a_fingerprint_of_no_columns_fits_every_base(bf16_dir, tmp_path):
    name, weight = next(iter(load_file(bf16_dir / "model.safetensors").items()))
    edit = edit_of(name, 0, weight, torch.arange(1), weight[:1] + 1)
    for number, found in enumerate(({}, {name: {}})):
        one = Patch(edits={name: edit}, fingerprint=found)
        patch.apply_to_folder(bf16_dir, one, tmp_path / str(number))


def test_names_of_tensors_are_printable(bf16_dir, tmp_path):
    save_file({"a\x1b[2J": torch.ones(1)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="control characters are not allowed"):
        patch.diff(bf16_dir, tmp_path)


def test_folders_that_are_no_models_in_safetensors(bf16_patch, tmp_path, sharded_dir):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        patch.apply_in_place(tmp_path / "nowhere", bf16_patch)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        patch.recover(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"has neither model.safetensors nor"):
        patch.apply_in_place(tmp_path / "empty", bf16_patch)
    base = Path(shutil.copytree(sharded_dir, tmp_path / "base"))
    index = base / "model.safetensors.index.json"
    good = json.loads(index.read_text())
    for weight_map, message in (
        ({}, "has no `weight_map`"),
        ({"a": "../base/model.safetensors"}, "must be a plain name that ends with"),
        ({"a": "model.bin"}, "must be a plain name that ends with"),
        ({**good["weight_map"], "b": "lost.safetensors"}, "has no lost.safetensors, which its"),
    ):
        index.write_text(json.dumps({"weight_map": weight_map}))
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            patch.apply_in_place(base, bf16_patch)
    index.unlink()
    os.mkfifo(index)
    with pytest.raises(FileNotFoundError, match="has neither model"):
        patch.apply_in_place(base, bf16_patch)
    index.unlink()
    index.write_text(json.dumps(good))
    (first, *_) = sorted(base.glob("*.safetensors"))
    shutil.copy(first, base / "twice.safetensors")
    index.write_text(json.dumps({"weight_map": {**good["weight_map"], "b": "twice.safetensors"}}))
    with pytest.raises(ValueError, match="only one of them can be the model's"):
        patch.apply_in_place(base, bf16_patch)


def test_a_damaged_base_is_refused(bf16_dir, bf16_patch, tmp_path):
    base = Path(shutil.copytree(bf16_dir, tmp_path / "base"))
    path = base / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-5])
    with pytest.raises(ValueError, match="is truncated or no safetensors file"):
        patch.apply_in_place(base, bf16_patch)
    path.write_bytes(whole.replace(b'"BF16"', b'"BF17"', 1))
    with pytest.raises(ValueError, match="is truncated or no safetensors file"):
        patch.apply_in_place(base, bf16_patch)


def test_an_output_in_use_stays_as_it_is(bf16_dir, bf16_patch, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("x")
    with pytest.raises(FileExistsError, match="is not empty"):
        patch.apply_to_folder(bf16_dir, bf16_patch, tmp_path / "out")
    assert names_of(tmp_path / "out") == ["mine"]


def test_what_was_written_is_read_back(bf16_dir, bf16_patch, tmp_path, monkeypatch):
    monkeypatch.setattr(folder_module, "_write", lambda *args: None)
    with pytest.raises(ValueError, match="was not written as it should be; nothing was left"):
        patch.apply_to_folder(bf16_dir, bf16_patch, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
