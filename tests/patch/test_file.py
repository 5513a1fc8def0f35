"""A patch's file: read as it was written, or refused whatever a stranger has changed."""

import contextlib
import copy
import json
import random
import shutil
import stat
import struct

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from pacatune import patch
from pacatune.cli.entry import main
from pacatune.files.checkpoint import Checkpoint
from pacatune.format.tensors import TENSORS_NAME
from pacatune.ops.columns import bits
from pacatune.patch.base import check_base
from pacatune.patch.file import _KEY, _digest, is_patch
from tests.full_disk import limited_files
from tests.mutations import mutated
from tests.patch.conftest import assert_same_columns


@pytest.fixture
def path(bf16_patch, tmp_path):
    patch.save(bf16_patch, tmp_path / "p.safetensors")
    return tmp_path / "p.safetensors"


def test_a_patch_is_read_as_it_was_written(path, bf16_patch):
    found = patch.load(path)
    assert_same_columns(found, bf16_patch)
    assert (found.base, found.fingerprint) == (bf16_patch.base, bf16_patch.fingerprint)
    assert found.adapter.keys() == {"adapter_config.json", "pacatune.json", TENSORS_NAME}
    assert all(torch.equal(file, bf16_patch.adapter[name]) for name, file in found.adapter.items())
    assert is_patch(path)
    # As readable as its folder; safetensors makes its files private.
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE(path.parent.stat().st_mode) & 0o666


def test_nothing_is_overwritten_and_a_disk_that_runs_full_leaves_nothing(
    path, bf16_patch, tmp_path
):
    before = path.read_bytes()
    with pytest.raises(FileExistsError, match="exists; choose another name"):
        patch.save(bf16_patch, path)
    assert path.read_bytes() == before
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


def described(path):
    """Return what a patch says of itself, without its checksum, and its tensors."""
    with safe_open(path, framework="pt") as file:
        description = json.loads(file.metadata()[_KEY])
    del description["digest"]
    # Copies: what is loaded is a map of the file.
    return description, {name: tensor.clone() for name, tensor in load_file(path).items()}


def write(path, tensors, description):
    """Write a patch that says something else of itself, with a checksum that fits."""
    if isinstance(description, dict):
        digest = _digest(tensors, json.loads(json.dumps(description)))
        description = {**description, "digest": digest}
    save_file(tensors, path, metadata={"format": "pt", _KEY: json.dumps(description)})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": 1}, "is a patch of version 1, and this pacatune reads 2; use the pacatune"),
        ({"tensors": {"a": {"dim": 0, "shape": [1]}}}, "lacks a part of a patch, or.*a.before"),
        ({"tensors": {}}, "`before` is empty"),
        ({"fingerprint": {TENSOR: {"32": "x"}}}, f"`fingerprint` has columns of '{TENSOR}' that"),
        ({"fingerprint": {TENSOR: {"x": "x"}}}, "lacks a part of a patch, or.*'x'"),
        ({"tensors": {TENSOR: {"dim": 1e999, "shape": [32, 32]}}}, "is no finite number"),
        ({"base": "a\x1b[2J"}, r"'a\\x1b\[2J'; control characters are not allowed"),
    ],
)
def test_descriptions_that_do_not_fit(path, changes, message):
    description, tensors = described(path)
    path.unlink()
    write(path, tensors, description | changes)
    with pytest.raises(ValueError, match=message):
        patch.load(path)


def use(path, bf16_patch, checkpoint, tensors, scratch):
    """Do all that is done with a patch; return its inverse."""
    found = patch.load(path)
    assert main(["inspect", str(path), "--columns"]) == 0
    if found.adapter:
        shutil.rmtree(scratch, ignore_errors=True)
        patch.to_adapter(found, scratch)
    with contextlib.suppress(ValueError):  # most overlap
        patch.stack([found, bf16_patch])
    check_base(checkpoint, found)
    patch.apply(tensors, found)
    return found.inverse()


def test_mutated_descriptions(bf16_dir, bf16_patch, path, tmp_path, capsys):
    """Whatever a patch says of itself, it is a ValueError or an edit that can be taken back."""
    (description, parts), generator, num_refused = described(path), random.Random(0), 0
    checkpoint, tensors = Checkpoint.open(bf16_dir), load_file(bf16_dir / "model.safetensors")
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    for _ in range(300):
        write(path, parts, mutated(copy.deepcopy(description), generator))
        try:
            inverse = use(path, bf16_patch, checkpoint, tensors, tmp_path / "adapter")
        except ValueError:
            num_refused += 1
        else:
            patch.apply(tensors, inverse)
        assert all(torch.equal(bits(tensors[name]), bits(before[name])) for name in before)
    assert num_refused > 100
    printed = capsys.readouterr().out
    assert all(sign.isprintable() or sign == "\n" for sign in printed)
