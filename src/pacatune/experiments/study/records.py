"""One file for each run that has ended, written whole or not at all."""

import json
import re
from dataclasses import asdict, fields
from pathlib import Path

from pacatune.experiments.study.result import RunRecord

_KEY_IN_NAME = re.compile(r"-([0-9a-f]{24})\.json$")


class Records:
    """The records in a folder, by key.

    Args:
        folder: It is made when the first record is written.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        files = sorted(folder.glob("*.json")) if folder.is_dir() else []
        self._files = {match[1]: f for f in files if (match := _KEY_IN_NAME.search(f.name))}

    def find(self, key: str) -> RunRecord | None:
        """Return the record of a run, failed or not; None if it never ended.

        Raises:
            ValueError: If its file was damaged by somebody else.
        """
        path = self._files.get(key)
        if path is None:
            return None
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            record = RunRecord(**{f.name: values[f.name] for f in fields(RunRecord)})
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path} is no record of a run ({type(error).__name__}: {error}); delete it, and "
                "the run is done again."
            ) from error
        return record

    def write(self, record: RunRecord) -> None:
        """Write a record, in the place of an earlier one of the same run."""
        self._folder.mkdir(parents=True, exist_ok=True)
        name = f"{record.arm}-{record.learning_rate:g}-seed{record.seed}-{record.key}.json"
        path = self._folder / name
        partial = path.with_name(f".{name}")
        text = json.dumps(asdict(record), indent=1, ensure_ascii=False) + "\n"
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
        older = self._files.get(record.key)
        if older is not None and older != path:
            older.unlink(missing_ok=True)
        self._files[record.key] = path
