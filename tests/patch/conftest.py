"""Models in 16 bits with an adapter, saved once."""

import shutil
from pathlib import Path

import pytest
import torch

from pacatune import patch
from pacatune.ops.columns import bits
from tests.adapters.fixtures import adapter_dir, save_adapter
from tests.conftest import build_model

__all__ = ["adapter_dir"]


def contents(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != ".pacatune-lock"
    }


def assert_same_edits(one, other):
    assert one.edits.keys() == other.edits.keys()
    for name, edit in one.edits.items():
        theirs = other.edits[name]
        assert (edit.dim, edit.shape, edit.dtype) == (theirs.dim, theirs.shape, theirs.dtype)
        for part in ("indices", "original", "new"):
            assert torch.equal(bits(getattr(edit, part)), bits(getattr(theirs, part))), name


@pytest.fixture(scope="session")
def bf16_dir(tmp_path_factory):
    """A tiny Llama in bfloat16; not to be changed."""
    folder = tmp_path_factory.mktemp("bf16") / "my-base"
    build_model(300).bfloat16().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def bf16_adapter(tmp_path_factory, bf16_dir):
    """An adapter of it; not to be changed."""
    folder = tmp_path_factory.mktemp("bf16") / "adapter"
    save_adapter(bf16_dir, folder, dtype="bfloat16")
    return folder


@pytest.fixture(scope="session")
def bf16_patch(bf16_dir, bf16_adapter):
    return patch.make(bf16_dir, bf16_adapter)[0]


@pytest.fixture(scope="session")
def sharded_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sharded") / "base"
    build_model(300).bfloat16().save_pretrained(folder, max_shard_size="30KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    return folder


@pytest.fixture
def single(bf16_dir, tmp_path):
    return Path(shutil.copytree(bf16_dir, tmp_path / "base"))


@pytest.fixture(params=["single", "sharded"])
def base(request, bf16_dir, sharded_dir, tmp_path):
    """A base of our own, in one file or several."""
    source = bf16_dir if request.param == "single" else sharded_dir
    return Path(shutil.copytree(source, tmp_path / "base"))
