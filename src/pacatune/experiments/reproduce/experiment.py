"""What every table and figure offers: its work in cells, its settings, its part of the report.

What is computed is computed once: each cell has its file, and a killed run goes on.
"""

import datetime
import hashlib
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pacatune.experiments.reproduce.section import Section
from pacatune.experiments.reproduce.settings import SettingsBeside
from pacatune.reports.provenance import commit, cpu_name, num_cores, versions

__all__ = [
    "Cell",
    "CellStore",
    "Experiment",
    "Mode",
    "Results",
]


Result = dict[str, Any]
Mode = Literal["simulate", "small", "full"]
# Key of a cell -> what it computed.
Results = Mapping[str, dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One piece of work, whose result is kept."""

    key: str
    """Unique in its experiment; the name of its file."""
    title: str
    """What it does, for a line on the screen."""
    methods: tuple[str, ...]
    """Methods that it is about, for --only."""
    inputs: dict[str, Any]
    """Everything that decides the result, as JSON values: a kept result of others is not used."""
    run: Callable[[Path, Callable[[str], None]], Result]
    """Called with a folder of its own, which survives a kill, and with what shows a line."""


class CellStore:
    """The folder `cells/EXPERIMENT` of an output folder.

    Args:
        folder: Made where missing.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def find(self, cell: Cell) -> Result | None:
        """Return the kept result of a cell, None if there is none of the same inputs."""
        path = self._path(cell)
        if not path.is_file():
            return None
        try:
            kept = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:  # cut off by a full disk: made again
            return None
        same = isinstance(kept, dict) and kept.get("inputs") == _plain(cell.inputs)
        return kept if same and "result" in kept else None

    def compute(self, cell: Cell, tell: Callable[[str], None]) -> Result:
        """Run a cell and keep its result."""
        start = time.monotonic()
        result = cell.run(self._work_folder(cell), tell)
        kept = {
            "key": cell.key,
            "inputs": _plain(cell.inputs),
            "result": result,
            "seconds": round(time.monotonic() - start, 1),
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "machine": f"{cpu_name()}, {num_cores()} cores",
            "versions": versions("trl", "bitsandbytes", "timm"),
            **commit(),
        }
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self._path(cell)
        partial = path.with_name(f".{path.name}")
        partial.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
        partial.replace(path)
        return kept

    def write_failure(self, cell: Cell, text: str) -> Path:
        """Keep the traceback of a cell that failed; return where."""
        folder = self._work_folder(cell)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "failure.txt").write_text(text, encoding="utf-8")
        return folder / "failure.txt"

    def _path(self, cell: Cell) -> Path:
        return self.folder / f"{cell.key}.json"

    def _work_folder(self, cell: Cell) -> Path:
        """A folder for the inputs of this cell: what others left half done is not gone on with."""
        text = json.dumps(_plain(cell.inputs), sort_keys=True)
        digest = hashlib.sha256(text.encode()).hexdigest()[:8]
        return self.folder / "work" / f"{cell.key}-{digest}"


def _plain(values: dict[str, Any]) -> Any:
    """Return the values as JSON gives them back: tuples are lists."""
    return json.loads(json.dumps(values))


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """A table or figure of the paper."""

    name: str
    """On the command line."""
    title: str
    place: str
    """Where in the paper, and where its settings are."""
    methods: tuple[str, ...]
    """What --only takes."""
    cells: Callable[[Mode], list[Cell]]
    """The work of a mode."""
    section: Callable[[Mode, Results], Section]
    """The report on what there is."""
    settings: Callable[[Literal["small", "full"]], list[SettingsBeside]]
    """Ours beside the paper's."""
    cannot: Mapping[str, str]
    """Mode -> why it is not there."""
