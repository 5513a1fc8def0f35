import pytest

from tests.distributed.pair import Pair


@pytest.fixture(scope="package")
def pair_of_this_folder(tmp_path_factory):
    pairs = []

    def get():
        if not pairs or not pairs[-1].is_alive:
            pairs.append(Pair(tmp_path_factory.mktemp("pair") / "rendezvous"))
        return pairs[-1]

    yield get
    for pair in pairs:
        pair.close()


@pytest.fixture
def pair(pair_of_this_folder):
    """Two processes in one gloo group; new ones where a test has ended the last ones."""
    return pair_of_this_folder()
