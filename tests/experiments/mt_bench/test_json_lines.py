"""Rows survive whatever ends a run."""

import json
import threading

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


def test_threads_write_whole_lines(tmp_path):
    file = JsonLines(tmp_path / "rows.jsonl")

    def write(thread):
        for number in range(20):
            file.append({"thread": thread, "number": number, "text": "x" * 5000})

    threads = [threading.Thread(target=write, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    rows = [json.loads(line) for line in file.path.read_text().splitlines()]
    assert {(row["thread"], row["number"]) for row in rows} == {
        (thread, number) for thread in range(4) for number in range(20)
    }


def test_replacing_is_all_or_nothing(path, monkeypatch):
    file = JsonLines(path)
    whole = path.read_bytes()

    def rows():
        yield {"new": 1}
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        file.replace(rows())
    assert path.read_bytes() == whole
    file.replace([{"new": 1}])
    assert JsonLines(path).rows == [{"new": 1}]
