"""Results are kept by cell: found again with the same inputs, and only then."""

import json

import pytest

from pacatune.experiments.reproduce.experiment import Cell
from pacatune.experiments.reproduce.running import CellStore


@pytest.fixture
def store(tmp_path):
    return CellStore(tmp_path / "cells" / "table9")


def make_cell(run=None, **inputs):
    return Cell(
        key="one",
        title="a cell",
        methods=("paca",),
        inputs={"sizes": (1, 2), **inputs},
        run=run or (lambda folder, tell: {"value": 7}),
    )


def test_a_result_is_computed_once(store):
    assert store.find(make_cell()) is None
    kept = store.compute(make_cell(), print)
    assert kept["result"] == {"value": 7}
    assert "torch" in kept["versions"]
    assert store.find(make_cell()) == kept


def test_other_inputs_are_another_result(store):
    store.compute(make_cell(rank=8), print)
    assert store.find(make_cell(rank=16)) is None
    assert store.find(make_cell(rank=8))["result"] == {"value": 7}


def test_a_failed_cell_leaves_nothing(store):
    def fail(folder, tell):
        raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        store.compute(make_cell(fail), print)
    assert store.find(make_cell()) is None


def test_a_file_cut_off_in_the_middle_is_made_again(store):
    store.compute(make_cell(), print)
    path = store.folder / "one.json"
    path.write_text(path.read_text()[:40])
    assert store.find(make_cell()) is None
    path.write_text(json.dumps({"inputs": {"sizes": [1, 2]}}))
    assert store.find(make_cell()) is None


def test_each_input_has_its_own_folder_for_what_is_half_done(store):
    folders = []

    def note(folder, tell):
        folders.append(folder)
        return {}

    store.compute(make_cell(note), print)
    store.compute(make_cell(note), print)
    store.compute(make_cell(note, rank=1), print)
    assert folders[0] == folders[1] != folders[2]
