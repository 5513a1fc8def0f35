import functools

import pytest
import torch
from torch import nn

from tests.distributed import net
from tests.distributed.pair import Pair
from tests.distributed.tensor_parallel import in_parts, load


def processes(tmp_path_factory, world_size):
    groups = []

    def get():
        if not groups or not groups[-1].is_alive:
            rendezvous = tmp_path_factory.mktemp("processes") / "rendezvous"
            groups.append(Pair(rendezvous, world_size))
        return groups[-1]

    yield get
    for group in groups:
        group.close()


@pytest.fixture(scope="package")
def pair_of_this_folder(tmp_path_factory):
    yield from processes(tmp_path_factory, 2)


@pytest.fixture(scope="package")
def four_of_this_folder(tmp_path_factory):
    yield from processes(tmp_path_factory, 4)


@pytest.fixture
def pair(pair_of_this_folder):
    """Two processes in one gloo group; new ones where a test has ended the last ones."""
    return pair_of_this_folder()


@pytest.fixture
def four(four_of_this_folder):
    """Four processes in one gloo group."""
    return four_of_this_folder()


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
