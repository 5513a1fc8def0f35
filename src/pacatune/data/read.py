"""Rows of local files and hub data sets, each with the place it comes from."""

import csv
import functools
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pacatune.hub import check_on_hub

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
    local = Path(path).expanduser()
    if not is_local(path, option):
        rows = _read_hub(path, name, split, option, streaming=streaming)
    elif local.is_dir():
        rows = (row for file in _files_of(local) for row in _read_file(file, csv_columns))
    else:
        rows = _read_file(local, csv_columns)
    empty = True
    for row in rows:
        empty = False
        yield row
    if empty:
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
    names = {file: file.relative_to(folder) for file in files}
    held_out = [f for f in files if any(_EVALUATION_NAME.search(p.lower()) for p in names[f].parts)]
    if held_out and len(held_out) < len(files):
        raise ValueError(
            f"{folder} mixes training data with {names[held_out[0]]}, which looks like evaluation "
            f"data; set `data.path` to the training files and `data.eval_path` to {held_out[0]}."
        )
    return files


def read_template(template: str) -> str:
    """Return a chat template that is given as a file or as its text."""
    if "{" in template:
        return template
    path = Path(template).expanduser()
    if not path.is_file():
        raise FileNotFoundError(
            f"`data.chat_template` ({template!r}) is neither a file nor Jinja text; "
            "give a .jinja file, or the text with its {{ }} and {% %}."
        )
    return path.read_text(encoding="utf-8")


def _read_file(file: Path, csv_columns: Sequence[str] | None) -> Iterator[Row]:
    readers: dict[str, Callable[[Path], Iterator[tuple[int, Any]]]] = {
        ".jsonl": _read_jsonl,
        ".json": _read_json,
        ".csv": functools.partial(_read_csv, columns=csv_columns),
        ".parquet": _read_parquet,
    }
    if file.suffix not in readers:
        raise ValueError(
            f"{file} has the suffix {file.suffix!r}; data files are {_ACCEPTED}. Convert it."
        )
    try:
        for number, values in readers[file.suffix](file):
            place = f"{file}, row {number}"
            if not isinstance(values, dict):
                raise ValueError(
                    f"{place}: a {type(values).__name__}; each row must be an object with named "
                    'fields, as {"text": "..."}.'
                )
            yield Row(place, values)
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8 ({error.reason}); convert it to UTF-8.") from error


def _read_jsonl(file: Path) -> Iterator[tuple[int, Any]]:
    with file.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield number, _parse_json(line, f"{file}, row {number}")


def _read_json(file: Path) -> Iterator[tuple[int, Any]]:
    rows = _parse_json(file.read_text(encoding="utf-8-sig"), str(file))
    if not isinstance(rows, list):
        raise ValueError(
            f"{file} holds a {type(rows).__name__}; a .json file must be one list of rows. "
            "One object per line is .jsonl."
        )
    yield from enumerate(rows, start=1)


def _parse_json(text: str, place: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        hint = " Rename it to .jsonl if it holds one object per line." * (error.msg == "Extra data")
        raise ValueError(f"{place}: not valid JSON ({error}); mend it.{hint}") from error
    except RecursionError as error:
        raise ValueError(f"{place}: JSON nested too deeply to be data; flatten it.") from error


def _read_csv(file: Path, columns: Sequence[str] | None) -> Iterator[tuple[int, Any]]:
    with file.open(encoding="utf-8-sig", newline="") as lines:
        number = 0
        try:
            if columns is not None and next(csv.reader(lines), [""])[-1] == columns[-1]:
                columns = None
            lines.seek(0)
            reader = csv.DictReader(lines, columns, restkey="", strict=True)
            for number, values in enumerate(reader, start=1):
                if "" in values:
                    raise ValueError(
                        f"{file}, row {number}: more fields than the "
                        f"{len(reader.fieldnames or ())} columns; quote fields that hold commas."
                    )
                yield number, values
        except csv.Error as error:
            raise ValueError(
                f"{file}, row {number + 1}: not valid CSV ({error}); mend it or use .jsonl."
            ) from error


def _read_parquet(file: Path) -> Iterator[tuple[int, Any]]:
    import pyarrow  # type: ignore[import-untyped]
    import pyarrow.parquet  # type: ignore[import-untyped]

    try:
        with pyarrow.parquet.ParquetFile(file) as table:
            batches = (batch.to_pylist() for batch in table.iter_batches(batch_size=1000))
            rows = (_without_nulls(row) for batch in batches for row in batch)
            yield from enumerate(rows, start=1)
    except pyarrow.ArrowException as error:
        raise ValueError(f"{file} is not a readable Parquet file ({error}).") from error


def _read_hub(
    path: str, name: str | None, split: str, option: str, *, streaming: bool
) -> Iterator[Row]:
    table = load_hub(path, name, split, option, streaming=streaming)
    for number, values in enumerate(table, start=1):
        yield Row(f"{path} ({split}), row {number}", _without_nulls(dict(values)))


def load_hub(
    path: str, name: str | None, split: str, option: str, *, streaming: bool = False
) -> Any:
    """Load a split of a data set of the hub, or of a configuration of it."""
    from datasets import load_dataset
    from datasets.exceptions import DatasetNotFoundError

    check_on_hub(path, option, kind="dataset")
    try:
        return load_dataset(path, name, split=split, streaming=streaming)
    except (ConnectionError, DatasetNotFoundError) as error:
        raise FileNotFoundError(
            f"{path!r} is neither here nor a hub data set that can be reached "
            f"({type(error).__name__}); check `{option}` or the network."
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
