import pytest

from pacatune.reports.tables import ReportTable, table_lines


def test_the_last_letter_of_the_alignment_holds_for_what_follows():
    lines = table_lines(["a", "b", "c"], [["1", "2", ""]])
    assert lines == ["| a | b | c |", "|---|--:|--:|", "| 1 | 2 |  |"]
    assert table_lines(["a", "b", ""], [], "l") == ["| a | b | |", "|---|---|---|"]
    assert table_lines(["a", "b", "c"], [], "lrl")[1] == "|---|--:|---|"


def test_a_row_of_another_length_is_refused():
    with pytest.raises(ValueError, match=r"a row has 1 cells, the header 2 \(a, b\): \['1'\]"):
        table_lines(["a", "b"], [["1"]])


def test_a_table_is_its_lines():
    table = ReportTable(title="T", header=["a", "b", "c"], rows=[["1", "2", "3"]], note="n")
    assert table.lines() == ["| a | b | c |", "|---|---|--:|", "| 1 | 2 | 3 |"]
    assert table.alignment == "llr"
