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


def test_every_case_is_kept():
    assert DATA.keys() == twin.CASES.keys()


@pytest.mark.parametrize("name", twin.CASES)
def test_data(name):
    kept, found = DATA[name], twin.record_data(name)
    changed = [key for key in kept | found if kept.get(key) != found.get(key)]
    assert not changed, "\n".join(f"{key}: {kept.get(key)} -> {found.get(key)}" for key in changed)


@pytest.mark.parametrize("name", twin.RUNS)
def test_run(name):
    kept, found = RUNS[name], twin.record_run(name)
    changed = [f"gone: {entry}" for entry in sorted(kept - found)]
    changed += [f"new: {entry}" for entry in sorted(found - kept)]
    assert not changed, "\n".join(changed)
