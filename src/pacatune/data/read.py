"""Rows of local files and hub data sets, each with the place it comes from."""

import csv
import glob
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pacatune.pretrained import refuse_absent

SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")
_ACCEPTED = f"{', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}"
_EVALUATION_NAME = re.compile(r"(^|[-_.])(test|eval|val|valid|validation|dev)([-_.]|$)")

_Classes = Mapping[str, Sequence[str]]


@dataclass(frozen=True, slots=True)
class Row:
    """One record of the data and where it stands, for messages about it."""

    place: str
    values: dict[str, Any]
    classes: _Classes = field(default_factory=dict)
    """Names of the classes whose numbers a column of a table has."""


@contextmanager
def named(place: str) -> Iterator[None]:
    """Begin what is wrong in this block with the place that it is about."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from error


def read_rows(
    path: str, *, name: str | None = None, split: str = "train", option: str = "data.path"
) -> Iterator[Row]:
    """Yield every row of a file, a folder of files, or a hub data set.

    Rows are numbered from 1; in JSONL the number is that of the line.

    `option` is where `path` is from, for messages.
    """
    if is_local(path, option, split, name):
        sources = {str(file): _read(file) for file in files_of(path)}
    else:
        sources = {f"{path} ({split})": _rows_of(load_hub(path, name, split, option))}
    row = None
    for source, values in sources.items():
        for row in _numbered(source, values):
            yield row
    if row is None:
        raise ValueError(f"{path} holds no rows; give data with at least one example.")


def is_local(path: str, option: str, split: str, name: str | None) -> bool:
    """Whether a path is here; refuse one that is not and can be no data set of the hub."""
    local = Path(path).expanduser()
    if local.exists():
        if split != "train" or name is not None:
            what = f"the split {split!r}" if name is None else f"`data.name` ({name!r})"
            rule = "is for data sets of the hub; drop it, or give `data.eval_path`"
            raise ValueError(f"`{option}` ({path}) is local: {what} {rule}.")
        return True
    if local.suffix.lower() in SUFFIXES or path.startswith((".", "/", "~")) or path.count("/") > 1:
        raise FileNotFoundError(f"{path} does not exist; check `{option}`.")
    return False


def files_of(path: str) -> list[Path]:
    """Return a data file, or those of a folder, in order."""
    folder = Path(path).expanduser()
    if not folder.is_dir():
        return [folder]
    names = sorted(file.relative_to(folder) for file in folder.rglob("*"))
    is_hidden = {name: any(part[0] == "." for part in name.parts) for name in names}
    names = [n for n in names if n.suffix.lower() in SUFFIXES and not is_hidden[n]]
    if not names:
        raise ValueError(f"{folder} has no {_ACCEPTED} file; put the data there or name a file.")
    held_out = [n for n in names if any(_EVALUATION_NAME.search(part.lower()) for part in n.parts)]
    if held_out and len(held_out) < len(names):
        rule = f"mixes training data with {held_out[0]}, which looks like evaluation data"
        raise ValueError(f"{folder} {rule}; give that as `data.eval_path`, apart.")
    return [folder / name for name in names]


def read_template(template: str) -> str:
    """Return a chat template that is given as a file or as its text."""
    if "{" in template:
        return template
    path = Path(template).expanduser()
    if not path.is_file():
        rule = "is neither a file nor Jinja text with its {{ }} and {% %}"
        raise FileNotFoundError(f"`data.chat_template` ({template!r}) {rule}; give one.")
    return path.read_text(encoding="utf-8")


def _numbered(source: str, rows: Iterator[tuple[Any, _Classes]]) -> Iterator[Row]:
    number = 1
    try:
        for values, classes in rows:
            if isinstance(values, dict):
                yield Row(f"{source}, row {number}", values, classes)
            elif values is not ...:
                kind = type(values).__name__
                raise ValueError(f'a {kind} is no object with named fields, as {{"text": "..."}}')
            number += 1
    except (ValueError, RecursionError, csv.Error) as error:  # as of JSON and of UTF-8
        raise ValueError(
            f"{source}, row {number}: {error}; a .jsonl file has one object per line, a .json "
            "file is one list of them, and texts are in UTF-8. Mend it."
        ) from error


def _rows_of(table: Any) -> Iterator[tuple[Any, _Classes]]:
    """Yield the rows of a table with the names of the classes that its columns have."""
    kinds = table.features or {}
    classes = {column: kind.names for column, kind in kinds.items() if hasattr(kind, "names")}
    for row in table:
        yield _without_nulls(row), classes


def _read(file: Path) -> Iterator[tuple[Any, _Classes]]:
    """Yield the rows of a file, `...` for an empty line.

    datasets would give the arguments of all tool calls in JSON the same fields, and count no lines.
    It reads CSV by pandas, which would make null of the text NA, and numbers.
    """
    suffix = file.suffix.lower()
    if suffix == ".parquet":
        from datasets import load_dataset

        name = glob.escape(str(file))  # or it would be a pattern, and find other files
        yield from _rows_of(load_dataset("parquet", data_files=name, split="train", streaming=True))
        return
    if suffix not in SUFFIXES:
        raise ValueError(f"the suffix {file.suffix!r} is unknown: data files are {_ACCEPTED}")
    with file.open(encoding="utf-8-sig", newline="" if suffix == ".csv" else None) as lines:
        if suffix == ".csv":
            csv.field_size_limit(2**31 - 1)  # a document may be longer than Python's 131,072
            for values in csv.DictReader(lines, strict=True):
                if None in values:
                    raise csv.Error("more fields than columns; quote fields that hold commas")
                yield values, {}
        elif suffix == ".jsonl":
            for line in lines:
                yield json.loads(line) if line.strip() else ..., {}
        else:
            rows = json.load(lines)
            if not isinstance(rows, list):
                raise ValueError("no list of rows")
            for values in rows:
                yield values, {}


def load_hub(path: str, name: str | None, split: str, option: str) -> Any:
    """Load a split of a data set of the hub, or of a configuration of it."""
    from datasets import load_dataset
    from datasets.exceptions import DatasetNotFoundError

    refuse_absent(path, option=option, kind="dataset")
    try:
        return load_dataset(path, name, split=split)
    except (ConnectionError, DatasetNotFoundError) as error:
        raise FileNotFoundError(
            f"`{option}` ({path!r}) is neither a file or folder here nor a data set of the hub "
            f"that can be reached ({type(error).__name__}); check the path or the network."
        ) from error


def _without_nulls(row: dict[str, Any]) -> dict[str, Any]:
    """Drop nulls within the columns of a table, which gives all its objects the fields of all."""

    def drop(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: drop(inner) for key, inner in value.items() if inner is not None}
        return [drop(inner) for inner in value] if isinstance(value, list) else value

    return {column: drop(value) for column, value in row.items()}
