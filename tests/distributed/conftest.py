import pytest

from tests.distributed.pair import Pair


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
