import pytest

from tests.distributed.pair import Pair

POOLS = pytest.StashKey()


def processes(request, tmp_path_factory, world_size):
    """Return the folder's, which end with it; new ones where a test has ended them."""
    folder = request.node.getparent(pytest.Dir)
    pools = folder.stash.setdefault(POOLS, {})
    if world_size not in pools or not pools[world_size].is_alive:
        pools[world_size] = Pair(tmp_path_factory.mktemp("processes"), world_size)
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
