"""A table or figure of the paper: its numbers as rows, our jobs, and the page of both."""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from experiments.jobs import Finished, Job
from experiments.paper import METHOD_TITLES, MODEL, Printed
from pacatune.files.owned_folder import OwnedFolder
from pacatune.reports.provenance import commit_text, versions_text
from pacatune.reports.rows import Row, Table, number_text, table

RESULTS = Path(__file__).parents[1] / "results"
"""`NAME-small.json` of each experiment: what `results.json` in its folder held."""
NATS = "nats per token"
"""Unit of losses, of which less is better; of all other scores more is."""

_UNTRAINED = (METHOD_TITLES["none"], METHOD_TITLES["quantized"])
TOLERANCE = 0.05
_ABOUT = "docs/paper.md in the checkout says what stands beside what, and what the words mean."


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """What of the paper is put beside ours."""

    paper: Printed
    jobs: Callable[[], list[Job]]


def shares(paper: Printed, rows: Iterable[Row]) -> Iterator[Row]:
    """Yield what is compared: shares of the reference's number, and differences of scores."""
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        if row.unit == "ratio":
            yield row
        else:
            key = (row.what, row.model, row.setting, row.origin)
            groups.setdefault(key, []).append(row)
    if (reference := paper.reference) is None:
        return
    for group in groups.values():
        of = next((row for row in group if row.method.startswith(reference)), None)
        for row in group:
            if of is None or row is of or not of.value or row.method in _UNTRAINED:
                continue
            if row.what not in paper.scores:
                yield _share(row, of)
            elif row.unit == NATS:
                yield replace(of.minus(row), method=f"{row.method} - {of.method}")
            else:
                yield row.minus(of)


def _share(row: Row, of: Row) -> Row:
    """Return the share of another number; an estimate errs alike in both, so like ends divide."""
    share = row.over(of)
    if row.origin != "simulated" or not share.has_interval:
        return share
    ends = [getattr(row, end) / getattr(of, end) for end in ("low", "value", "high")]
    return replace(share, low=min(ends), high=max(ends))


def agreement(paper: Row, ours: Row, *, is_score: bool) -> str:
    """Return what our share or difference says of the paper's; docs/paper.md has the words."""
    even = 0.0 if is_score else 1.0
    low, high = (ours.low, ours.high) if ours.low is not None else (ours.value, ours.value)
    assert low is not None
    assert high is not None
    is_sure = ours.has_interval or ours.origin in ("counted", "simulated")
    if not is_score or (ours.unit == paper.unit and ours.model == paper.model):
        is_near = not is_score and abs(ours.value / paper.value - 1) <= TOLERANCE
        if is_sure and (is_near or low <= paper.value <= high):
            return "agrees"
    if not is_sure:
        return "one run"
    if low <= even <= high or paper.value == even:
        return "no significant difference"
    return "same order" if (low > even) == (paper.value > even) else "other order"


def comparison(experiment: Experiment, ours: Sequence[Row]) -> Table | None:
    """Return each of our shares beside the paper's; None where there is none."""
    printed = experiment.paper
    models = [row.model for row in printed.rows]
    beside = MODEL if MODEL in models else models[0]  # lines of a smaller model of ours
    stated = {(row.what, row.method, row.model): row for row in shares(printed, printed.rows)}
    lines = []
    for row in shares(printed, ours):
        model = row.model if row.model in models else beside
        paper = stated.get((row.what, row.method, model))
        if paper is None:
            continue
        is_score = row.what in printed.scores
        how = ", ".join(filter(None, (row.model, row.setting, row.origin)))
        unit = "" if row.unit == "ratio" else f" {row.unit}"
        lines.append(
            [
                row.what,
                row.method,
                _signed(paper, is_score=is_score),
                _signed(row, is_score=is_score) + unit,
                agreement(paper, row, is_score=is_score),
                how,
            ]
        )
    if not lines:
        return None
    header = ["quantity", "share or difference", "paper", "here", "", "here is"]
    return Table(header=header, cells=lines, num_index=2)


def _signed(row: Row, *, is_score: bool) -> str:
    if not is_score:
        return row.text()
    ends = ""
    if row.low is not None and row.high is not None:
        ends = f" ({row.low:+.3g} to {row.high:+.3g})"
    return f"{row.value:+.3g}{ends}"


def make_page(experiment: Experiment, found: Mapping[str, Finished]) -> str:
    """Return an experiment's page as Markdown: its table, the comparison, what made ours."""
    ours = [row for one in found.values() for row in one.rows]
    printed = experiment.paper
    numbers = [row for row in (*printed.rows, *ours) if row.unit != "ratio"]
    parts = [f"# {printed.title}", f"{printed.place}. {_ABOUT}"]
    if numbers:
        shown = table(numbers, ("model", "method"), ("what", "setting", "origin"))
        parts += ["\n".join(shown.markdown()), *shown.notes]
    compared = comparison(experiment, ours)
    if compared is not None:
        parts += ["\n".join(compared.markdown())]
    notes = [note for note in (printed.note, *(row.note for row in printed.claims)) if note]
    jobs = experiment.jobs()
    missing = [job.title or job.key for job in jobs if job.key not in found]
    failed = [f"{key}: {one.error}" for key, one in found.items() if one.error]
    for heading, texts in (("Notes", notes), ("Not run yet", missing), ("Failed", failed)):
        if texts:
            parts.append(f"{heading}:\n\n" + "\n".join(f"- {text}" for text in texts))
    return "\n\n".join([*parts, *sources(found)]) + "\n"


def write_results(found: Mapping[str, Finished], folder: OwnedFolder) -> None:
    """Write the rows of what did not fail into an open folder, as `read_results` reads them."""
    values = {
        key: {"rows": [row.to_dict() for row in one.rows], "provenance": one.provenance}
        for key, one in found.items()
        if one.error is None
    }
    folder.write_json("results.json", values)


def read_results(name: str, folder: Path = RESULTS) -> dict[str, Finished]:
    """Return the committed results of an experiment; nothing where there are none."""
    path = folder / f"{name}-small.json"
    if not path.is_file():
        return {}
    values = json.loads(path.read_text(encoding="utf-8"))
    return {
        key: Finished(rows=[Row(**row) for row in one["rows"]], provenance=one["provenance"])
        for key, one in values.items()
    }


def sources(found: Mapping[str, Finished]) -> list[str]:
    """Return where the numbers come from, a sentence for each combination of packages."""
    groups: dict[str, list[dict[str, object]]] = {}
    for one in found.values():
        made = one.provenance
        at = f"{commit_text(made)} ({versions_text(made['versions'])})"
        groups.setdefault(f"{made['machine']['name']}{at}", []).append(made)
    lines = []
    for where, made in groups.items():
        minutes = sum(float(str(one["seconds"])) for one in made) / 60
        days = sorted({str(one["date"])[:10] for one in made})
        when = days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}"
        jobs = "1 job" if len(made) == 1 else f"{len(made)} jobs"
        lines.append(f"{jobs}, {number_text(minutes, 'min')} minutes, {when}: {where}.")
    return lines
