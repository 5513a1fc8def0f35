"""Run experiments: cells that have no result yet, then the report on all that there are.

What is computed is computed once: each cell has its file, and a killed run goes on.
"""

import datetime
import hashlib
import json
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pacatune.experiments.reproduce.experiment import Cell, Experiment, Mode, Result, Section
from pacatune.experiments.reproduce.page import make_html, make_markdown
from pacatune.files.owned_folder import OwnedFolder
from pacatune.names import guess
from pacatune.reports.provenance import commit, cpu_name, num_cores, versions, versions_text

MARK = "reproduce.json"
ALL = "all"


def find_experiments(name: str, known: dict[str, Experiment]) -> list[Experiment]:
    """Return the experiment of a name, or `all`."""
    if name == ALL:
        return list(known.values())
    if name not in known:
        hint = guess(name, [*known, ALL])
        raise ValueError(f"unknown name {name!r}; {hint}Choose from {', '.join([*known, ALL])}.")
    return [known[name]]


def check_method(method: str, experiments: Sequence[Experiment]) -> None:
    """Refuse a method that none of the experiments has."""
    methods = list(dict.fromkeys(m for experiment in experiments for m in experiment.methods))
    if method not in methods:
        hint = guess(method, methods)
        raise ValueError(f"unknown method {method!r}; {hint}Choose from {', '.join(methods)}.")


def result_folder(folder: Path) -> OwnedFolder:
    """Return the folder of reproductions."""
    return OwnedFolder(path=folder, kind="reproductions")


@contextmanager
def open_folder(folder: Path, *, resume: bool) -> Iterator[None]:
    """Make the output folder ready, for this process alone until the end of the block."""
    output = result_folder(folder)
    if output.is_ours and not resume:
        raise FileExistsError(
            f"output folder {folder} holds results of an earlier run; go on with them: --resume, "
            "or choose another: --output DIR."
        )
    with output.going_on("*.json", "*.md", "*.html", "*.svg"):
        output.write_json(MARK, {"finished": False})
        yield


class CellStore:
    """The results of an experiment's cells, in `cells/EXPERIMENT` of an output folder."""

    def __init__(self, output: OwnedFolder, experiment: str) -> None:
        self._output, self._name = output, f"cells/{experiment}"
        self.folder = output.path / self._name

    def find(self, cell: Cell) -> Result | None:
        """Return what the file of a cell holds, None if there is none of the same inputs."""
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
        self._output.write_json(f"{self._name}/{cell.key}.json", kept, edited=False)
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


def run_experiments(
    experiments: Sequence[Experiment],
    mode: Mode,
    folder: Path,
    command: str,
    tell: Callable[[str], None],
    only: str | None = None,
) -> list[Section]:
    """Compute what is missing in an opened folder, of one method or all; report on each."""
    sections: list[Section] = []
    output = result_folder(folder)
    for experiment in experiments:
        if mode in experiment.cannot:
            tell(f"{experiment.name}: {experiment.cannot[mode]}")
            continue
        store = CellStore(output, experiment.name)
        cells = experiment.cells(mode)
        wanted = [cell for cell in cells if only is None or only in cell.methods]
        failures: dict[str, str] = {}
        for number, cell in enumerate(wanted, 1):
            kept = store.find(cell)
            state = "kept" if kept else "..."
            tell(f"{experiment.name} {number}/{len(wanted)}: {cell.title} {state}")
            if kept is None and (failure := _compute(store, cell, tell)):
                failures[cell.key] = failure
        found = {cell.key: kept for cell in cells if (kept := store.find(cell)) is not None}
        sections.append(make_section(experiment, mode, found, command, failures))
        write_report(sections[-1:], experiment.name, experiment.title, output)
    summary = {
        "finished": not any(section.missing for section in sections),
        "command": command,
        "outcomes": {section.name: section.outcomes() for section in sections},
    }
    output.write_json(MARK, summary)
    return sections


def _compute(store: CellStore, cell: Cell, tell: Callable[[str], None]) -> str | None:
    """Run a cell; return why it failed, if it did: the others go on."""
    try:
        store.compute(cell, tell)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(
            f"stopped in: {cell.title}; the same command with --resume goes on"
        ) from None
    except Exception as error:  # whatever it is, what the other cells cost is not lost
        text = f"{type(error).__name__}: {' '.join(str(error).split())}"
        path = store.write_failure(cell, traceback.format_exc())
        tell(f"  failed: {text} (all of it is in {path})")
        return text
    return None


def make_section(
    experiment: Experiment,
    mode: Mode,
    kept: Mapping[str, Result],
    command: str,
    failures: Mapping[str, str] | None = None,
) -> Section:
    """Return an experiment's part of the report, by what the files of its cells hold."""
    failures = failures or {}
    section = experiment.section(mode, {key: found["result"] for key, found in kept.items()})
    section.missing = [
        cell.title + (f" (failed: {failures[cell.key]})" if cell.key in failures else "")
        for cell in experiment.cells(mode)
        if cell.key not in kept
    ]
    section.failures = dict(failures)
    section.provenance = _provenance(list(kept.values()), command)
    section.numbers["cells"] = dict(kept)
    return section


def _provenance(kept: list[Result], command: str) -> str:
    """Say what made the results, where, and with which packages."""
    if not kept:
        return ""
    packages = {tuple(sorted(cell["versions"].items())) for cell in kept}
    commits = {
        f"{cell['commit'][:9]}{' (modified)' * cell['is_modified']}"
        for cell in kept
        if cell.get("commit")
    }
    machines = {cell.get("machine", "a machine that was not recorded") for cell in kept}
    texts = [versions_text(dict(one)) for one in sorted(packages)]
    days = sorted({cell["date"][:10] for cell in kept})
    seconds = sum(cell["seconds"] for cell in kept)
    at = f" at commit {', '.join(sorted(commits))}" if commits else ""
    return (
        f"`{command}`{at}, {days[0]}{f' to {days[-1]}' if len(days) > 1 else ''}, "
        f"{seconds / 60:.1f} minutes on {' and '.join(sorted(machines))} ({'; '.join(texts)})."
    )


def write_report(sections: Sequence[Section], name: str, heading: str, output: OwnedFolder) -> None:
    """Write NAME.md, NAME.html, NAME.json and the pictures of sections."""
    for section in sections:
        for number, chart in enumerate(section.charts, 1):
            output.write(f"{section.name}-{number}.svg", chart.svg)
    output.write(f"{name}.md", make_markdown(sections, heading))
    output.write(f"{name}.html", make_html(sections, heading))
    values = {section.name: section_values(section) for section in sections}
    output.write_json(f"{name}.json", values)


def section_values(section: Section) -> dict[str, Any]:
    """Return a section as JSON values."""
    return {
        "title": section.title,
        "place": section.place,
        "outcomes": section.outcomes(),
        "outcomes_by_origin": {origin: section.outcomes(origin) for origin in section.origins},
        "rates_at_edge": section.rates,
        "verdicts": [asdict(verdict) for verdict in section.verdicts],
        "tables": [
            {"title": t.title, "header": t.header, "rows": t.rows, "note": t.note}
            for t in section.tables
        ],
        "notes": section.notes,
        "missing": section.missing,
        "failures": section.failures,
        "provenance": section.provenance,
        **section.numbers,
    }
