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


def differences(kept, found):
    names = dict.fromkeys([*kept, *found])
    return [
        f"{name}: {kept.get(name)} -> {found.get(name)}"
        for name in names
        if kept.get(name) != found.get(name)
    ]


def test_cases_are_all_kept():
    assert DATA.keys() == twin.CASES.keys()


@pytest.mark.parametrize("name", twin.CASES)
def test_data(name):
    assert differences(DATA[name], twin.record_data(name)) == []


@pytest.mark.parametrize("name", twin.RUNS)
def test_run(name):
    found = twin.record_run(name)
    assert {"gone": sorted(RUNS[name] - found), "new": sorted(found - RUNS[name])} == {
        "gone": [],
        "new": [],
    }
