import json

import pytest

from pacatune.data.read import read_rows


def rows_of(path, **options):
    return [(row.place.rpartition(", ")[2], row.values) for row in read_rows(str(path), **options)]


def write_lines(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_jsonl_numbers_rows_by_line(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text('\ufeff{"text": "a"}\n\n{"text": "é"}\n', encoding="utf-8")
    assert rows_of(path) == [("row 1", {"text": "a"}), ("row 3", {"text": "é"})]


def test_json(tmp_path):
    path = tmp_path / "data.json"
    path.write_text('[{"text": "a"}, {"text": "b"}]')
    assert rows_of(path) == [("row 1", {"text": "a"}), ("row 2", {"text": "b"})]


def test_csv(tmp_path):
    path = tmp_path / "data.csv"
    path.write_text('prompt,completion\n"a, b",c\n"two\nlines",d\n')
    assert rows_of(path) == [
        ("row 1", {"prompt": "a, b", "completion": "c"}),
        ("row 2", {"prompt": "two\nlines", "completion": "d"}),
    ]


def test_parquet(tmp_path):
    from datasets import Dataset

    path = tmp_path / "data.parquet"
    messages = [{"role": "user", "content": "a"}]
    Dataset.from_list([{"messages": messages}, {"messages": messages}]).to_parquet(path)
    assert rows_of(path) == [("row 1", {"messages": messages}), ("row 2", {"messages": messages})]


def test_folder_reads_every_kind_in_order_and_skips_hidden(tmp_path):
    folder = tmp_path / ".hidden" / "data"
    (folder / "deep").mkdir(parents=True)
    (folder / ".cache").mkdir()
    write_lines(folder / "b.jsonl", {"text": "2"})
    (folder / "a.csv").write_text("text\n1\n")
    (folder / "deep" / "c.json").write_text('[{"text": "3"}]')
    write_lines(folder / ".cache" / "d.jsonl", {"text": "no"})
    (folder / "notes.md").write_text("no data")
    assert [values["text"] for _, values in rows_of(folder)] == ["1", "2", "3"]


def test_folder_of_one_split_only_is_read_whatever_its_name(tmp_path):
    write_lines(tmp_path / "test.jsonl", {"text": "a"})
    assert len(rows_of(tmp_path)) == 1


def test_hub_data_set(tmp_path, monkeypatch):
    import datasets

    calls = []

    def load_dataset(path, name, split, streaming):
        calls.append((path, name, split))
        return datasets.Dataset.from_list([{"text": "a"}])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    rows = list(read_rows("owner/data", name="small", split="validation"))
    assert calls == [("owner/data", "small", "validation")]
    assert rows[0].place == "owner/data (validation), row 1"
    assert rows[0].values == {"text": "a"}


@pytest.mark.parametrize("path", ["missing.jsonl", "./missing", "/missing/folder", "~/missing-x"])
def test_missing_path(path):
    with pytest.raises(FileNotFoundError, match=f"{path} does not exist; check `data.path`"):
        rows_of(path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "a.jsonl",
            '{"text": "a"}\n{"text": \n',
            r"a.jsonl, row 2: Expecting value: .*; a .jsonl file has one object per",
        ),
        ("a.jsonl", "[1]\n", "a.jsonl, row 1: a list is no object with named"),
        ("a.jsonl", "[" * 100_000 + "\n", r"row 1: maximum recursion"),
        ("a.jsonl", "\n \n", "a.jsonl holds no rows; give data with at least one example"),
        ("a.json", "[]", "a.json holds no rows"),
        ("a.json", '{"text": "a"}', "no list of rows.*a .json file is one list of them"),
        (
            "a.json",
            '{"text": "a"}\n{"text": "b"}',
            "Extra data.*a .jsonl file has one",
        ),
        ("a.csv", "text\n", "a.csv holds no rows"),
        ("a.csv", "text\na,b\n", "row 1: more fields than columns; quote"),
        ("a.csv", 'text\na\n"b"c\n', r"row 2: .*expected.*Mend it"),
        ("a.txt", "text", r"suffix '.txt' is unknown: data files are .jsonl, .json, .csv or .p"),
    ],
)
def test_bad_files(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        rows_of(path)


def test_not_utf8(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'text\n"\xff\xfe"\n')
    with pytest.raises(ValueError, match=r"row 1: 'utf-8' codec can't decode.* texts are in UTF-8"):
        rows_of(path)


def test_folder_without_data(tmp_path):
    (tmp_path / "a.txt").write_text("")
    with pytest.raises(ValueError, match=r"has no .jsonl, .json, .csv or .parquet file; put"):
        rows_of(tmp_path)


@pytest.mark.parametrize(
    "name",
    ["test.jsonl", "eval_1.csv", "validation-0.parquet", "dev.json", "my_test.jsonl", "val/a.json"],
)
def test_folder_that_would_train_on_its_test_data(tmp_path, name):
    write_lines(tmp_path / "train.jsonl", {"text": "a"})
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).touch()
    with pytest.raises(ValueError, match=f"mixes training data with {name}.*`data.eval_path`"):
        rows_of(tmp_path)
