"""Rows of local files and hub data sets, each with the place it comes from."""

import csv
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")
_ACCEPTED = f"{', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}"
_EVALUATION_NAME = re.compile(r"(^|[-_.])(test|eval|val|valid|validation|dev)([-_.]|$)")


@dataclass(frozen=True, slots=True)
class Row:
    """One record of the data and where it stands, for messages about it."""

    place: str
    values: dict[str, Any]


def read_rows(
    path: str,
    *,
    name: str | None = None,
    split: str = "train",
    csv_columns: Sequence[str] | None = None,
    option: str = "data.path",
    streaming: bool = False,
) -> Iterator[Row]:
    """Yield every row of a file, a folder of files, or a hub data set.

    Rows are numbered from 1; in JSONL the number is that of the line.

    Columns of .csv files without a header are given as `csv_columns`; a first row that names the
    last of them is a header all the same. `option` is where `path` is from, for messages. With
    `streaming`, rows of the hub come while they are asked for.
    """
    rows: Iterator[Row]
    if is_local(path, option):
        local = Path(path).expanduser()
        files = _files_of(local) if local.is_dir() else [local]
        rows = (row for file in files for row in _read_file(file, csv_columns))
    else:
        table = load_hub(path, name, split, option, streaming=streaming)
        numbered = enumerate(map(_without_nulls, table), start=1)
        rows = _numbered(f"{path} ({split})", numbered)
    row = None
    for row in rows:
        yield row
    if row is None:
        raise ValueError(f"{path} holds no rows; give data with at least one example.")


def is_local(path: str, option: str) -> bool:
    """Whether a path is here; refuse one that is not and can be no data set of the hub."""
    local = Path(path).expanduser()
    if local.exists():
        return True
    if local.suffix in SUFFIXES or path.startswith((".", "/", "~")) or path.count("/") > 1:
        raise FileNotFoundError(f"{path} does not exist; check `{option}`.")
    return False


def is_image_folder(path: str, option: str) -> bool:
    """Whether a path is a folder here; refuse one that is not and can be no data set of the hub."""
    folder = Path(path).expanduser()
    if folder.is_dir():
        return True
    if folder.exists() or path.startswith((".", "/", "~")) or path.count("/") > 1:
        problem = "is a file" if folder.exists() else "does not exist"
        raise FileNotFoundError(
            f"{path} {problem}; `{option}` must be a folder with a folder of images per class."
        )
    return False


def _files_of(folder: Path) -> list[Path]:
    files = sorted(
        file
        for file in folder.rglob("*")
        if file.suffix in SUFFIXES
        and not any(part.startswith(".") for part in file.relative_to(folder).parts)
    )
    if not files:
        raise ValueError(f"{folder} has no {_ACCEPTED} file; put the data there or name a file.")
    names = [file.relative_to(folder) for file in files]
    held_out = [n for n in names if any(_EVALUATION_NAME.search(part.lower()) for part in n.parts)]
    if held_out and len(held_out) < len(files):
        found = f"mixes training data with {held_out[0]}, which looks like evaluation data"
        raise ValueError(f"{folder} {found}; give that as `data.eval_path`, apart.")
    return files


def read_template(template: str) -> str:
    """Return a chat template that is given as a file or as its text."""
    if "{" in template:
        return template
    path = Path(template).expanduser()
    if not path.is_file():
        rule = "is neither a file nor Jinja text with its {{ }} and {% %}"
        raise FileNotFoundError(f"`data.chat_template` ({template!r}) {rule}; give one.")
    return path.read_text(encoding="utf-8")


def _read_file(file: Path, csv_columns: Sequence[str] | None) -> Iterator[Row]:
    if file.suffix not in SUFFIXES:
        found = f"has the suffix {file.suffix!r}"
        raise ValueError(f"{file} {found}; data files are {_ACCEPTED}. Convert it.")
    try:
        if file.suffix == ".csv":
            yield from _numbered(str(file), _read_csv(file, csv_columns))
        elif file.suffix == ".parquet":
            from datasets import load_dataset

            table = load_dataset("parquet", data_files=str(file), split="train", streaming=True)
            yield from _numbered(str(file), enumerate(map(_without_nulls, table), start=1))
        else:
            yield from _numbered(str(file), _read_json(file))
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8 ({error.reason}); convert it to UTF-8.") from error


def _numbered(source: str, rows: Iterable[tuple[int, Any]]) -> Iterator[Row]:
    for number, values in rows:
        place = f"{source}, row {number}"
        if not isinstance(values, dict):
            rule = 'each row must be an object with named fields, as {"text": "..."}'
            raise ValueError(f"{place}: a {type(values).__name__}; {rule}.")
        yield Row(place, values)


def _read_json(file: Path) -> Iterator[tuple[int, Any]]:
    """Yield objects, one per line or in one list.

    datasets would give the arguments of all tool calls the same fields, and count no lines.
    """
    number = None
    try:
        with file.open(encoding="utf-8-sig") as lines:
            if file.suffix == ".json":
                rows = json.load(lines)
                if not isinstance(rows, list):
                    raise json.JSONDecodeError("no list of rows", "", 0)
                yield from enumerate(rows, start=1)
                return
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield number, json.loads(line)
    except (json.JSONDecodeError, RecursionError) as error:
        where = "" if number is None else f", row {number}"
        rule = "a .json file is one list of rows, a .jsonl file has one object per line"
        raise ValueError(f"{file}{where}: not valid JSON ({error}); {rule}.") from error


def _read_csv(file: Path, columns: Sequence[str] | None) -> Iterator[tuple[int, Any]]:
    """Yield rows of texts: pandas, and so datasets, would make null of the text NA, and numbers."""
    with file.open(encoding="utf-8-sig", newline="") as lines:
        if columns is not None and next(csv.reader(lines), [""])[-1] == columns[-1]:
            columns = None
        lines.seek(0)
        reader = csv.DictReader(lines, columns, strict=True)
        for number in count(1):
            try:
                values = next(reader, {})
                if None in values:
                    raise csv.Error("more fields than columns; quote fields that hold commas")
            except csv.Error as error:
                place = f"{file}, row {number}"
                raise ValueError(f"{place}: not valid CSV ({error}); mend it.") from error
            if not values:
                return
            yield number, values


def load_hub(
    path: str, name: str | None, split: str, option: str, *, streaming: bool = False
) -> Any:
    """Load a split of a data set of the hub, or of a configuration of it."""
    from datasets import load_dataset
    from datasets.exceptions import DatasetNotFoundError

    try:
        return load_dataset(path, name, split=split, streaming=streaming)
    except (ConnectionError, DatasetNotFoundError) as error:
        raise FileNotFoundError(
            f"`{option}` ({path!r}) is neither a file or folder here nor a data set of the hub "
            f"that can be reached ({type(error).__name__}); check the path or the network."
        ) from error


def _without_nulls(row: dict[str, Any]) -> dict[str, Any]:
    """Drop nulls within the columns of a table.

    A table gives all its objects the same fields: a tool call would have the arguments of all.
    """

    def drop(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: drop(inner) for key, inner in value.items() if inner is not None}
        return [drop(inner) for inner in value] if isinstance(value, list) else value

    return {column: drop(value) for column, value in row.items()}
