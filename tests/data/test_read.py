"""Rows of files, folders and the hub, and the place of each."""

import re

import pytest
from datasets import Dataset

from pacatune.data.read import read_rows
from tests.data.conftest import write_lines

LONG = "word " * 40_000


def rows_of(path, **options):
    return [(row.place.rpartition(", ")[2], row.values) for row in read_rows(str(path), **options)]


@pytest.mark.parametrize(
    ("name", "content", "rows"),
    [  # A row of JSONL has the number of its line.
        ("a.jsonl", '\ufeff{"text": "a"}\n\n{"text": "é"}\n', {1: {"text": "a"}, 3: {"text": "é"}}),
        ("a.json", '[{"text": "a"}, {"text": "b"}]', {1: {"text": "a"}, 2: {"text": "b"}}),
        ("a.csv", 'a,b\n"1,",c\n"3\n",d\n', {1: {"a": "1,", "b": "c"}, 2: {"a": "3\n", "b": "d"}}),
        ("A.JSONL", '{"text": "a"}', {1: {"text": "a"}}),
        # A document, longer than Python reads by itself.
        ("A.CSV", f"text\n{LONG}\n", {1: {"text": LONG}}),
    ],
)
def test_files(tmp_path, name, content, rows):
    (tmp_path / name).write_text(content, encoding="utf-8")
    assert rows_of(tmp_path / name) == [(f"row {n}", values) for n, values in rows.items()]


def test_folder_reads_every_kind_in_order_and_skips_hidden(tmp_path):
    folder = tmp_path / ".hidden" / "data"
    (folder / "deep").mkdir(parents=True)
    (folder / ".cache").mkdir()
    write_lines(folder / "b.jsonl", [{"text": "2"}])
    (folder / "a.CSV").write_text("text\n1\n")
    (folder / "deep" / "c.json").write_text('[{"text": "3"}]')
    write_lines(folder / ".cache" / "d.jsonl", [{"text": "no"}])
    (folder / "notes.md").write_text("no data")
    assert [values["text"] for _, values in rows_of(folder)] == ["1", "2", "3"]


def test_hub_data_set(monkeypatch):
    import datasets

    calls = []

    def load_dataset(path, name, split):
        calls.append((path, name, split))
        return datasets.Dataset.from_list([{"text": "a"}])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    rows = list(read_rows("owner/data", name="small", split="validation"))
    assert calls == [("owner/data", "small", "validation")]
    assert rows[0].place == "owner/data (validation), row 1"
    assert rows[0].values == {"text": "a"}


@pytest.mark.parametrize("path", ["missing.jsonl", "missing.JSONL", "./missing", "~/missing-x"])
def test_missing_path(path):
    with pytest.raises(FileNotFoundError, match=f"{path} does not exist; check `data.path`"):
        rows_of(path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"text": "a"}\n{"text": \n', r"row 2: Expecting value: .*; a .jsonl file has"),
        ("a.jsonl", "[1]\n", "a.jsonl, row 1: a list is no object with named"),
        ("a.jsonl", "[" * 100_000 + "\n", r"row 1: maximum recursion"),
        ("a.jsonl", "\n \n", "a.jsonl holds no rows; give data with at least one example"),
        ("a.jsonl", b'text\n"\xff\xfe"\n', r"row 1: 'utf-8' codec .* texts are in UTF-8. Mend it"),
        ("a.json", '{"text": "a"}', "no list of rows.*a .json file is one list of them"),
        ("a.json", '{"text": "a"}\n{"text": "b"}', "Extra data.*a .jsonl file has one"),
        ("a.csv", "text\na,b\n", "row 1: more fields than columns; quote"),
        ("a.csv", 'text\na\n"b"c\n', r"row 2: .*expected.*Mend it"),
        ("a.txt", "text", r"suffix '.txt' is unknown: data files are .jsonl, .json, .csv or .p"),
    ],
)
def test_bad_files(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=message):
        rows_of(tmp_path / name)


@pytest.mark.parametrize("name", ["test.jsonl", "validation-0.parquet", "my_dev.csv", "val/a.json"])
def test_folder_that_would_train_on_its_test_data(tmp_path, name):
    with pytest.raises(ValueError, match=r"has no .jsonl, .json, .csv or .parquet file; put the"):
        rows_of(tmp_path)
    (tmp_path / name).parent.mkdir(exist_ok=True)
    write_lines(tmp_path / name, [{"text": "a"}])
    if name == "test.jsonl":  # the only split is read whatever its name
        assert len(rows_of(tmp_path)) == 1
    write_lines(tmp_path / "train.jsonl", [{"text": "a"}])
    rule = f"mixes training data with {re.escape(name)}, .*`data.eval_path`"
    with pytest.raises(ValueError, match=rule):
        rows_of(tmp_path)


@pytest.mark.parametrize("name", ["d[1]", "d?", "d*", "[d"])
def test_a_file_is_named_and_not_a_pattern(tmp_path, name):
    for other in (name, "d1"):
        Dataset.from_list([{"text": other}]).to_parquet(str(tmp_path / f"{other}.parquet"))
    assert rows_of(tmp_path / f"{name}.parquet") == [("row 1", {"text": name})]
