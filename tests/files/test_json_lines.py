"""Rows survive whatever ends a run."""

import json
import os
import threading

import pytest

from pacatune.files.json_lines import JsonLines

ROWS = [{"a": 1}, {"a": "\u2028\nß"}]


@pytest.fixture
def path(tmp_path):
    file = JsonLines(tmp_path / "folder" / "rows.jsonl")
    for row in ROWS:
        file.append(row)
    return file.path


def test_rows_come_back(path):
    assert JsonLines(path).rows == ROWS
    assert len(path.read_text().splitlines()) == 2
    assert path.read_bytes().isascii()


def test_every_cut_of_the_last_line_is_repaired(path):
    whole = path.read_bytes()
    start = whole.index(b"\n") + 1
    for end in range(start, len(whole)):
        path.write_bytes(whole[:end])
        file = JsonLines(path)
        is_cut = start < end < len(whole) - 1
        assert file.rows == (ROWS if end == len(whole) - 1 else ROWS[:1])
        assert len(file.notes) == is_cut
        if is_cut:
            assert "the last line of" in file.notes[0]
        file.append({"b": 2})
        assert JsonLines(path).rows[-1] == {"b": 2}
        assert len(path.read_text().splitlines()) == len(file.rows) + 1


def test_a_damaged_line_in_the_middle_is_refused(path):
    path.write_bytes(b'{"a": \n' + path.read_bytes())
    with pytest.raises(ValueError, match=r"line 1 is damaged: .*remove that line"):
        JsonLines(path)


@pytest.mark.parametrize("last", [b"\0\0\0", b"[1]", b'"x"', b"\xff"])
def test_a_last_line_that_is_no_row_is_removed(path, last):
    whole = path.read_bytes()
    path.write_bytes(whole + last)
    assert JsonLines(path).rows == ROWS
    assert path.read_bytes() == whole


def test_a_full_disk_leaves_no_half_line(path, monkeypatch):
    whole = path.read_bytes()
    file = JsonLines(path)

    def fail(descriptor):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        with pytest.raises(OSError, match="No space left"):
            file.append({"b": 2})
    assert path.read_bytes() == whole
    file.append({"c": 3})
    assert JsonLines(path).rows == [*ROWS, {"c": 3}]


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
