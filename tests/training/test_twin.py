"""Data and runs are what tests/data/twin.json keeps of them; tests/data/twin.py writes it anew."""

import pytest

from tests.data import twin

DATA, RUNS = twin.read()


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    folder = tmp_path_factory.mktemp("twin")
    twin.build(folder)
    return folder


@pytest.fixture(autouse=True)
def _in_folder(built, monkeypatch):
    monkeypatch.chdir(built)


@pytest.mark.parametrize("name", twin.CASES)
def test_data(name):
    assert twin.record_data(name) == DATA[name]


@pytest.mark.parametrize("name", twin.RUNS)
def test_run(name):
    assert twin.record_run(name) == RUNS[name]
