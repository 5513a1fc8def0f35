"""What model folders hold."""

import torch

from pacatune.files.checkpoint import Checkpoint
from pacatune.patch.edit import bits


def contents(folder):
    """Every file's bytes by its name."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != ".pacatune-lock"
    }


def assert_same_tensors(one, other):
    one, other = Checkpoint.open(one), Checkpoint.open(other)
    assert one.entries.keys() == other.entries.keys()
    for name in one.entries:
        assert torch.equal(bits(one.tensor(name)), bits(other.tensor(name))), name
