"""Models in 16 bits with an adapter, saved once."""

import shutil
from pathlib import Path

import pytest
import torch

from pacatune import patch
from pacatune.ops.columns import bits
from pacatune.patch import Patch, WeightColumns
from tests.adapters.fixtures import adapter_dir, save_adapter
from tests.conftest import build_model

__all__ = ["adapter_dir"]


def contents(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != ".pacatune-lock"
    }


def assert_same_columns(one, other):
    """Compare two patches, before and after."""
    for ours, theirs in ((one.before, other.before), (one.after, other.after)):
        assert ours.keys() == theirs.keys()
        for name, own in ours.items():
            their = theirs[name]
            assert (own.dim, own.shape, own.form) == (their.dim, their.shape, their.form)
            for part in ("indices", "values"):
                assert torch.equal(bits(getattr(own, part)), bits(getattr(their, part))), name


def change_of(name, dim, weight, columns, new):
    """Return the patch that writes `new` over some columns of one tensor."""
    return Patch.of([(WeightColumns.of(name, dim, weight, torch.tensor(columns)), new)])


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
