"""The pool of processes: what tests leave in it would slow all that run beside it."""

from pathlib import Path

import torch
from torch.distributed.device_mesh import init_device_mesh

from tests.distributed.tensor_parallel import load, marks

pytestmark = marks


def num_threads():
    return len(list(Path("/proc/self/task").iterdir()))


def use_meshes(folder):
    """One that a model in parts keeps, and another."""
    model = load(folder)
    assert model(input_ids=torch.ones(1, 4, dtype=torch.int64)).logits.shape[:2] == (1, 4)
    mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("data", "tensor"))
    torch.distributed.all_reduce(torch.ones(1), group=mesh.get_group("tensor"))


def test_meshes_share_their_threads(pair, save_base):
    folder = save_base()
    pair.run(use_meshes, folder)
    before = pair.run(num_threads)
    for _ in range(3):
        pair.run(use_meshes, folder)
    assert pair.run(num_threads) == before
