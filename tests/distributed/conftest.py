import functools

import pytest
import torch
from torch import nn

from tests.distributed import net
from tests.distributed.pair import Pair
from tests.distributed.tensor_parallel import in_parts, load

POOLS = pytest.StashKey()


def processes(request, tmp_path_factory, world_size):
    """Return the folder's, which end with it; new ones where a test has ended them."""
    folder = request.node.getparent(pytest.Dir)
    pools = folder.stash.setdefault(POOLS, {})
    if world_size not in pools or not pools[world_size].is_alive:
        pools[world_size] = Pair(tmp_path_factory.mktemp("processes") / "rendezvous", world_size)
        folder.addfinalizer(pools[world_size].close)
    return pools[world_size]


@pytest.fixture
def pair(request, tmp_path_factory):
    """Two processes in one gloo group."""
    return processes(request, tmp_path_factory, 2)


@pytest.fixture
def four(request, tmp_path_factory):
    """Four processes in one gloo group."""
    return processes(request, tmp_path_factory, 4)


@pytest.fixture(scope="module")
def save_base(tmp_path_factory):
    """Makes a folder with a pretrained model of some sizes, whose biases are not zero."""

    @functools.cache
    def save(sizes=()):
        base = net.build_base("float64", sizes)
        for name, parameter in base.named_parameters():
            if name.endswith("bias"):
                nn.init.normal_(parameter, generator=torch.Generator().manual_seed(0))
        folder = str(tmp_path_factory.mktemp("base"))
        base.save_pretrained(folder)
        return folder

    return save


@pytest.fixture
def assert_equal(pair, save_base):
    """Checks that work(make) returns the same tensors in parts as in one process.

    `make` takes a dtype, and returns the pretrained model.
    """

    def check(work, *args, sizes=None, plan="auto", atol=1e-12):
        folder = save_base(tuple((sizes or {}).items()))
        expected = work(functools.partial(load, folder, parts=False), *args)
        for found in pair.run(in_parts, work, folder, plan, *args):
            assert len(found) == len(expected) > 0
            for one, other in zip(found, expected, strict=True):
                torch.testing.assert_close(one, other, rtol=0, atol=atol)

    return check
