"""A patch's file: read as it was written, or refused whatever a stranger has changed."""

import json
import struct

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from pacatune import patch
from pacatune.patch.edit import bits
from pacatune.patch.file import _KEY, _digest, is_patch
from tests.full_disk import limited_files


@pytest.fixture
def path(bf16_patch, tmp_path):
    patch.save(bf16_patch, tmp_path / "p.safetensors")
    return tmp_path / "p.safetensors"


def test_a_patch_is_read_as_it_was_written(path, bf16_patch):
    found = patch.load(path)
    assert found.edits.keys() == bf16_patch.edits.keys()
    for name, edit in bf16_patch.edits.items():
        other = found.edits[name]
        assert (other.dim, other.shape, other.dtype) == (edit.dim, edit.shape, edit.dtype)
        assert torch.equal(other.indices, edit.indices)
        assert torch.equal(bits(other.new), bits(edit.new))
        assert torch.equal(bits(other.original), bits(edit.original))
    assert (found.base, found.fingerprint) == (bf16_patch.base, bf16_patch.fingerprint)
    assert found.adapter.config == bf16_patch.adapter.config
    assert is_patch(path)


def test_nothing_is_overwritten(path, bf16_patch):
    before = path.read_bytes()
    with pytest.raises(FileExistsError, match="exists; choose another name"):
        patch.save(bf16_patch, path)
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


def test_a_disk_that_runs_full_leaves_nothing(bf16_patch, tmp_path):
    full = pytest.raises(ValueError, match=r"could not write '.*new/p' .*nothing was left behind")
    with limited_files(), full:
        patch.save(bf16_patch, tmp_path / "new" / "p")
    assert list((tmp_path / "new").iterdir()) == []


def test_every_flipped_bit_and_every_cut_is_found(path):
    whole = path.read_bytes()
    (header,) = struct.unpack("<Q", whole[:8])
    for place in [*range(8, 8 + header, 997), *range(8 + header, len(whole), 131)]:
        damaged = bytearray(whole)
        damaged[place] ^= 1
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="safetensors"):
            patch.load(path)
    for size in range(0, len(whole), 499):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"truncated|holds|damaged|is 0 bytes"):
            patch.load(path)


def test_what_is_no_patch(tmp_path, bf16_adapter):
    for missing in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(FileNotFoundError, match="does not exist, or is no file"):
            patch.load(missing)
    with pytest.raises(ValueError, match="is no patch; `pacatune patch make` writes one"):
        patch.load(bf16_adapter / "adapter_model.safetensors")
    assert not is_patch(bf16_adapter / "adapter_model.safetensors")
    assert not is_patch(bf16_adapter)


TENSOR = "model.layers.0.self_attn.q_proj.weight"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": 3}, "is a patch of version 3, and this pacatune reads 1 and 2; upgrade"),
        ({"tensors": {"a": {"dim": 0, "shape": [1]}}}, "lacks a part of a patch, or.*a.indices"),
        ({"tensors": {}}, "`edits` is empty"),
        ({"tensors": None}, "lacks a part of a patch"),
        ({"fingerprint": 3}, "lacks a part of a patch"),
        ({"fingerprint": {"other": {"0": "x"}}}, "`fingerprint` has columns of 'other' that no"),
        ({"fingerprint": {TENSOR: {"32": "x"}}}, f"`fingerprint` has columns of '{TENSOR}' that"),
        ({"fingerprint": {TENSOR: {"-1": "x"}}}, f"`fingerprint` has columns of '{TENSOR}' that"),
        ({"fingerprint": {TENSOR: {"x": "x"}}}, "lacks a part of a patch, or.*'x'"),
        ({"tensors": {TENSOR: {"dim": 1e999, "shape": [32, 32]}}}, "is no finite number"),
        ({"tensors": {TENSOR: {"dim": 9, "shape": [32, 32]}}}, r"`dim` \(9\) must be one of"),
        ({"base": "a\x1b[2J"}, r"'a\\x1b\[2J'; control characters are not allowed"),
        ({"adapter": {"config": 3, "sidecar": None}}, "lacks a part of a patch, or.*no texts"),
        ({"adapter": {"config": "{}", "sidecar": 3}}, "lacks a part of a patch, or.*no texts"),
    ],
)
def test_descriptions_that_do_not_fit(path, changes, message):
    """With a checksum that fits."""
    with safe_open(path, framework="pt") as file:
        description = json.loads(file.metadata()[_KEY]) | changes
    tensors = load_file(path)
    del description["digest"]
    description["digest"] = _digest(tensors, description)
    path.unlink()
    save_file(tensors, path, metadata={"format": "pt", _KEY: json.dumps(description)})
    with pytest.raises(ValueError, match=message):
        patch.load(path)
