"""Run experiments: cells that have no result yet, then the report on all that there are."""

import json
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pacatune.experiments.reproduce.experiment import Cell, CellStore, Experiment, Mode
from pacatune.experiments.reproduce.page import make_html, make_markdown
from pacatune.experiments.reproduce.section import Section
from pacatune.names import guess
from pacatune.reports.provenance import versions_text

__all__ = [
    "MARK",
    "find_experiments",
    "make_section",
    "open_folder",
    "run_experiments",
    "write_report",
]

MARK = "reproduce.json"
ALL = "all"


def find_experiments(name: str, known: dict[str, Experiment]) -> list[Experiment]:
    """Return the experiments of a name.

    Args:
        name: Name of one, or `all`.
        known: All there are.

    Raises:
        ValueError: If there is none; names the nearest.
    """
    if name == ALL:
        return list(known.values())
    if name not in known:
        hint = guess(name, [*known, ALL])
        raise ValueError(f"unknown name {name!r}; {hint}Choose from {', '.join([*known, ALL])}.")
    return [known[name]]


def check_method(method: str, experiments: Sequence[Experiment]) -> None:
    """Refuse a method that none of the experiments has.

    Raises:
        ValueError: Names the nearest.
    """
    methods = list(dict.fromkeys(m for experiment in experiments for m in experiment.methods))
    if method not in methods:
        hint = guess(method, methods)
        raise ValueError(f"unknown method {method!r}; {hint}Choose from {', '.join(methods)}.")


def open_folder(folder: Path, *, resume: bool) -> None:
    """Make the output folder ready.

    Args:
        folder: Gets the results.
        resume: Go on with what is there.

    Raises:
        FileExistsError: If it is a file, holds other things, or holds results and `resume` is off.
    """
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"output {folder} is a file; choose another: --output DIR.")
    is_ours = (folder / MARK).is_file()
    if folder.exists() and any(folder.iterdir()) and not is_ours:
        raise FileExistsError(
            f"output folder {folder} holds files but no {MARK}, so they are not from reproduce and "
            "stay as they are; choose another: --output DIR."
        )
    if is_ours and not resume:
        raise FileExistsError(
            f"output folder {folder} holds results of an earlier run; go on with them: --resume, "
            "or choose another: --output DIR."
        )
    folder.mkdir(parents=True, exist_ok=True)
    if not is_ours:
        _write_json(folder / MARK, {"finished": False})


def run_experiments(
    experiments: Sequence[Experiment],
    mode: Mode,
    folder: Path,
    command: str,
    tell: Callable[[str], None],
    only: str | None = None,
) -> list[Section]:
    """Compute what is missing and write the report after each experiment.

    Args:
        experiments: In order.
        mode: What is done of each.
        folder: Opened.
        command: The user's, for the record.
        tell: Shows a line about what goes on.
        only: A method; cells of others are left alone.
    """
    sections: list[Section] = []
    for experiment in experiments:
        if mode in experiment.cannot:
            tell(f"{experiment.name}: {experiment.cannot[mode]}")
            continue
        store = CellStore(folder / "cells" / experiment.name)
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
        write_report(sections[-1:], experiment.name, experiment.title, folder)
    _write_json(folder / MARK, _summary(sections, command))
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
    kept: Mapping[str, dict[str, Any]],
    command: str,
    failures: Mapping[str, str] | None = None,
) -> Section:
    """Return an experiment's part of the report.

    Args:
        experiment: Which one.
        mode: What was done of it.
        kept: Key of a cell -> what its file holds.
        command: The user's, for the record.
        failures: Key of a cell -> why it failed in this run.
    """
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


def _provenance(kept: list[dict[str, Any]], command: str) -> str:
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
    dates = sorted(cell["date"] for cell in kept)
    seconds = sum(cell["seconds"] for cell in kept)
    at = f" at commit {', '.join(sorted(commits))}" if commits else ""
    return (
        f"`{command}`{at}, {dates[0][:10]}"
        + (f" to {dates[-1][:10]}" if dates[0][:10] != dates[-1][:10] else "")
        + f", {seconds / 60:.1f} minutes on {' and '.join(sorted(machines))} "
        f"({'; '.join(texts)})."
    )


def write_report(sections: Sequence[Section], name: str, heading: str, folder: Path) -> None:
    """Write NAME.md, NAME.html, NAME.json and the pictures of sections."""
    for section in sections:
        for number, chart in enumerate(section.charts, 1):
            path = folder / f"{section.name}-{number}.svg"
            path.write_text(chart.svg, encoding="utf-8")
    (folder / f"{name}.md").write_text(make_markdown(sections, heading), encoding="utf-8")
    (folder / f"{name}.html").write_text(make_html(sections, heading), encoding="utf-8")
    _write_json(folder / f"{name}.json", {s.name: section_values(s) for s in sections})


def section_values(section: Section) -> dict[str, Any]:
    """Return a section as JSON values."""
    return {
        "title": section.title,
        "place": section.place,
        "outcomes": section.outcomes(),
        "outcomes_by_origin": {origin: section.outcomes(origin) for origin in section.origins},
        "rates_at_edge": section.rates,
        "verdicts": [
            {"outcome": v.outcome, "origin": v.origin, "text": v.text} for v in section.verdicts
        ],
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


def _summary(sections: Sequence[Section], command: str) -> dict[str, Any]:
    return {
        "finished": not any(section.missing for section in sections),
        "command": command,
        "outcomes": {section.name: section.outcomes() for section in sections},
    }


def _write_json(path: Path, values: Any) -> None:
    partial = path.with_name(f".{path.name}")
    partial.write_text(json.dumps(values, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    partial.replace(path)
