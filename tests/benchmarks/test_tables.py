"""The tables of the documents: what they show of a result, and where it comes from."""

import pytest

from benchmarks import tables
from benchmarks.results import read
from pacatune.reports.rows import Row


@pytest.mark.parametrize("name", tables.VIEWS)
def test_every_table_has_its_committed_numbers(name):
    text = tables.block(name)
    assert len([line for line in text.splitlines() if line.startswith("| ")]) >= 2
    # Variants are explained as settings, and as quantities.
    assert ("wrote `benchmarks/results/" in text) == tables.VIEWS[name].is_first
    if name == "lean-units":
        assert "`level 2`: gate and up from the norm's input;" in text
    if name == "kernels":
        rows = {(r.what, r.method): r.value for r in read(name).rows if r.setting == "eager"}
        floor = rows["forward", "frozen"]
        assert f"\n| frozen | {floor} |" in text
        assert f"\n| paca | {rows['forward', 'paca'] - floor} |" in text


def test_a_word_in_a_name_is_no_name():
    rows = [Row(what="changed elements of the base", method="paca / lora, float32", value=1.0)]
    words = tables._words(rows)
    assert {"paca", "lora"} <= words
    assert "elements" not in words


def test_tables_that_there_are_not(tmp_path):
    with pytest.raises(ValueError, match="no table 'steps'; there are step, "):
        tables.block("steps")
    with pytest.raises(FileNotFoundError, match=r"`python -m benchmarks\.step` writes it"):
        tables.block("step", tmp_path)
