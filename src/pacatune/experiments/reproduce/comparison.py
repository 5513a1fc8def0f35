"""A table of the paper as an experiment: the paper's numbers, and each quantity of ours beside."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial

from pacatune.experiments.reproduce.charts import bars
from pacatune.experiments.reproduce.experiment import (
    Cell,
    Chart,
    Experiment,
    Measured,
    Mode,
    Results,
    Scale,
    Section,
)
from pacatune.experiments.reproduce.settings import SettingsBeside
from pacatune.experiments.reproduce.verdicts import Column, Numbers, judge, name_of, share
from pacatune.paper.tables import Row, Table
from pacatune.reports.tables import ReportTable


@dataclass(frozen=True, kw_only=True)
class Source:
    """What computes some of our numbers for a table, and the columns in which they stand."""

    cells: list[Cell]
    columns: Callable[[Results], list[tuple[Column, Numbers]]]
    note: str = ""
    """What limits them, once there are any."""


def table_experiment(
    table: Table,
    about: Sequence[str],
    sources: Callable[[Mode], list[Source]],
    settings: Callable[[Scale], list[SettingsBeside]],
    *,
    notes: Sequence[str] = (),
    cannot: Mapping[str, str] | None = None,
    finish: Callable[[Section, Results], None] = lambda section, results: None,
) -> Experiment:
    """Return the experiment of a table; `finish` adds what it has beside its columns."""

    def section(mode: Mode, results: Results) -> Section:
        part = Section(
            name=table.name,
            title=table.title,
            place=table.place,
            about=list(about),
            notes=list(notes),
        )
        columns: list[tuple[Column, Numbers]] = []
        for source in sources(mode):
            columns += source.columns(results)
            if source.note and any(cell.key in results for cell in source.cells):
                part.notes.append(source.note)
        fill_section(part, table, columns)
        finish(part, results)
        return part

    return Experiment(
        name=table.name,
        title=table.title,
        place=table.place,
        methods=tuple(table.methods()),
        cells=lambda mode: [cell for source in sources(mode) for cell in source.cells],
        section=section,
        settings=settings,
        cannot=cannot or {},
    )


def fill_section(section: Section, table: Table, columns: Sequence[tuple[Column, Numbers]]) -> None:
    """Add the paper's table, and a comparison, a picture and verdicts for each column of ours."""
    section.tables.append(_papers_table(table))
    for column, ours in columns:
        rows = [row for row in table.rows if row.key in ours]
        if not rows:
            continue
        section.tables.append(_comparison(table, column, rows, ours))
        section.charts.append(_chart(column, rows, ours))
        section.verdicts += judge(table, column, ours)
        section.rates |= {
            line: number.at_edge for line, number in ours.items() if number.rate is not None
        }
    section.numbers["rows"] = [
        {
            "row": row.key,
            "paper": dict(row.values),
            "ours": {
                column.quantity.key: asdict(ours[row.key])
                for column, ours in columns
                if row.key in ours
            },
        }
        for row in table.rows
    ]


def _papers_table(table: Table) -> ReportTable:
    """Return the paper's table as printed."""
    quantities = [q for q in table.quantities if any(q.key in row.values for row in table.rows)]
    rows = [
        [row.model, row.title, _rank(row.rank), *(_printed(table, row, q.key) for q in quantities)]
        for row in table.rows
        if row.values
    ]
    header = ["model", "method", "rank", *(f"{q.title}, {q.unit}" for q in quantities)]
    return ReportTable(title=f"What the paper reports ({table.label})", header=header, rows=rows)


def _printed(table: Table, row: Row, key: str) -> str:
    """Return a number of the paper with as many digits as it prints in that column."""
    if key not in row.values:
        return "-"
    column = [f"{other.values[key]:g}" for other in table.rows if key in other.values]
    num_digits = max(len(text.partition(".")[2]) for text in column)
    return f"{row.values[key]:,.{num_digits}f}"


def _rank(rank: int | None) -> str:
    return "-" if rank is None else str(rank)


def _comparison(table: Table, column: Column, rows: list[Row], ours: Numbers) -> ReportTable:
    """Return our numbers beside the paper's.

    A line is named after what ours was obtained on. Where that is not the paper's model, the
    paper's has its own columns.
    """
    quantity, paper = column.quantity, column.paper
    has_rates = any(ours[row.key].rate is not None for row in rows)
    mine = [f"ours, {quantity.unit}", *["rate"] * has_rates]
    theirs = f"paper, {paper.unit}"
    header = ["model", "method", "rank"]
    if column.is_same:
        header += [theirs, *mine, "difference"]
    else:
        header += [*mine, "paper's model", "its rank", theirs, *_shares(table, column)]
    lines = []
    for row in rows:
        number, stated = ours[row.key], _printed(table, row, paper.key)
        here = [number.text(_number, " ({} to {})"), *[_rate(number)] * has_rates]
        line = [column.model or row.model, row.title, _rank(column.rank(row))]
        if column.is_same:
            line += [stated, *here, _difference(column, row, number.value)]
        else:
            line += [*here, row.model, _rank(row.rank), stated]
            line += _relative(table, column, row, ours)
        lines.append(line)
    notes = [column.about, *dict.fromkeys(_notes(rows, column, ours))]
    title = quantity.title[0].upper() + quantity.title[1:]
    return ReportTable(title=title, header=header, rows=lines, note=" ".join(filter(None, notes)))


def _rate(number: Measured) -> str:
    return "-" if number.rate is None else f"{number.rate:g}{' (edge)' * number.at_edge}"


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _shares(table: Table, column: Column) -> list[str]:
    name = next((row.title for row in table.rows if row.method == table.reference), "")
    what = f"over {name}" if column.is_score else f"as a share of {name}'s"
    return [f"paper, {what}", f"ours, {what}"] + ([] if column.is_score else ["difference"])


def _relative(table: Table, column: Column, row: Row, ours: Numbers) -> list[str]:
    """Return both as a share of the reference method's on the same model, and their difference."""
    paper = column.paper.key
    for reference in table.rows:
        known = paper in reference.values and reference.key in ours
        if reference.method == table.reference and reference.model == row.model and known:
            break
    else:
        return ["-"] * (2 if column.is_score else 3)
    here = share(column, ours[row.key].value, ours[reference.key].value)
    if paper not in row.values:
        return ["-", f"{here:+.3g}"] if column.is_score else ["-", f"{here:.2f}", "-"]
    stated = share(column, row.values[paper], reference.values[paper])
    if column.is_score:
        return [f"{stated:+.2f}", f"{here:+.3g}"]
    return [f"{stated:.2f}", f"{here:.2f}", f"{here - stated:+.2f}"]


def _difference(column: Column, row: Row, here: float) -> str:
    paper = row.values.get(column.paper.key)
    if paper is None:
        return "-"
    return f"{here - paper:+.2f}" if column.is_score else f"{here / paper - 1:+.1%}"


def _notes(rows: list[Row], column: Column, ours: Numbers) -> Iterator[str]:
    for row in rows:
        note = ours[row.key].note
        if note:
            yield f"{column.model or row.model}, {name_of(row, column.rank(row))}: {note}."


def _chart(column: Column, rows: list[Row], ours: Numbers) -> Chart:
    models = list(dict.fromkeys(row.model for row in rows))
    has_same_ranks = all(column.rank(row) == row.rank for row in rows)
    names = []
    for row in rows:
        rank = f"r={row.rank}" if row.rank is not None and has_same_ranks else ""
        parts = (row.model if len(models) > 1 else "", row.title, rank)
        names.append(" ".join(filter(None, parts)))
    here = "here" if column.is_same else f"here: {column.model}"
    draw = partial(
        bars,
        names,
        [row.values.get(column.paper.key) for row in rows],
        [ours[row.key] for row in rows],
        (
            f"{column.paper.title}, {column.paper.unit}",
            f"{column.quantity.title}, {column.quantity.unit}",
        ),
        (f"the paper: {models[0]}" if len(models) == 1 else "the paper", here),
    )
    return Chart(caption=f"{column.quantity.title}: the paper and {here}", draw=draw)
