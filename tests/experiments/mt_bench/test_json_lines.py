"""Rows survive whatever ends a run."""

import pytest

from experiments.mt_bench.json_lines import JsonLines

ROWS = [{"a": 1}, {"a": "\u2028\nß"}]


@pytest.fixture
def path(tmp_path):
    file = JsonLines(tmp_path / "folder" / "rows.jsonl")
    for row in ROWS:
        file.append(row)
    return file.path


def test_what_comes_after_a_cut_off_line_is_whole(path):
    whole = path.read_bytes()
    assert whole.isascii()
    assert whole.count(b"\n") == 2
    start = whole.index(b"\n") + 1
    for end in range(start, len(whole)):
        path.write_bytes(whole[:end])
        file = JsonLines(path)
        assert file.rows == (ROWS if end == len(whole) - 1 else ROWS[:1])
        file.append({"b": 2})
        assert JsonLines(path).rows == [*file.rows, {"b": 2}]


def test_a_line_that_is_no_row_is_passed_over(path):
    path.write_bytes(b'{"a": \n' + path.read_bytes() + b'\0\0\n[1]\n"x"\n\xff')
    assert JsonLines(path).rows == ROWS
