"""The paper's table, and each quantity of ours beside it."""

from collections.abc import Iterator, Sequence
from functools import partial

from pacatune.experiments.paper.tables import Row, Table
from pacatune.experiments.reproduce.charts import bars
from pacatune.experiments.reproduce.section import Chart, Measured, Section
from pacatune.experiments.reproduce.verdicts import Column, Ours, judge, name_of, share
from pacatune.reports.tables import ReportTable

__all__ = ["fill_section", "papers_table"]


def papers_table(table: Table) -> ReportTable:
    """Return the paper's table as printed."""
    quantities = [q for q in table.quantities if any(q.key in row.values for row in table.rows)]
    digits = {q.key: _num_digits(table, q.key) for q in quantities}
    rows = [
        [
            row.model,
            row.title,
            _rank(row.rank),
            *(_printed(row.values.get(key), number) for key, number in digits.items()),
        ]
        for row in table.rows
        if row.values
    ]
    header = ["model", "method", "rank", *(f"{q.title}, {q.unit}" for q in quantities)]
    return ReportTable(title=f"What the paper reports ({table.label})", header=header, rows=rows)


def _num_digits(table: Table, key: str) -> int:
    """Return how many digits the paper prints behind the point in a column."""
    texts = [f"{row.values[key]:g}" for row in table.rows if key in row.values]
    return max(len(text.partition(".")[2]) for text in texts)


def _printed(value: float | None, num_digits: int) -> str:
    return "-" if value is None else f"{value:,.{num_digits}f}"


def _rank(rank: int | None) -> str:
    return "-" if rank is None else str(rank)


def fill_section(section: Section, table: Table, columns: Sequence[Column], ours: Ours) -> None:
    """Add the paper's table, and a comparison, a picture and verdicts for each column of ours.

    Args:
        section: Gets them.
        table: The paper's.
        columns: In the order of the report; those without a number of ours are left out.
        ours: All numbers there are.
    """
    section.tables.append(papers_table(table))
    for column in columns:
        rows = [row for row in table.rows if (row.key, column.quantity.key) in ours]
        if not rows:
            continue
        section.tables.append(_comparison(table, column, rows, ours))
        section.charts.append(_chart(column, rows, ours))
        section.verdicts += judge(table, column, ours)
    tuned = {line: number for (line, _), number in ours.items() if number.rate is not None}
    section.rates |= {line: number.at_edge for line, number in tuned.items()}
    section.numbers["rows"] = [
        {
            "row": row.key,
            "paper": dict(row.values),
            "ours": {
                key: value.to_dict() for (name, key), value in ours.items() if name == row.key
            },
        }
        for row in table.rows
    ]


def _comparison(table: Table, column: Column, rows: list[Row], ours: Ours) -> ReportTable:
    """Return our numbers beside the paper's.

    A line is named after what ours was obtained on. Where that is not the paper's model, the
    paper's has its own columns.
    """
    quantity, paper = column.quantity, column.paper
    numbers = {row.key: ours[row.key, quantity.key] for row in rows}
    has_rates = any(number.rate is not None for number in numbers.values())
    digits = _num_digits(table, paper.key)
    header = ["model", "method", "rank"]
    if column.is_same:
        header += [f"paper, {paper.unit}", f"ours, {quantity.unit}", *["rate"] * has_rates]
        header.append("difference")
    else:
        header += [f"ours, {quantity.unit}", *["rate"] * has_rates]
        header += ["paper's model", "its rank", f"paper, {paper.unit}", *_shares(table, column)]
    lines = []
    for row in rows:
        number, stated = numbers[row.key], _printed(row.values.get(paper.key), digits)
        here = [_with_spread(number), *[_rate(number)] * has_rates]
        model = row.model if column.is_same else column.model
        line = [model, row.title, _rank(column.rank(row))]
        if column.is_same:
            difference = _difference(column, row.values.get(paper.key), number.value)
            line += [stated, *here, difference]
        else:
            line += [*here, row.model, _rank(row.rank), stated]
            line += _relative(table, column, row, ours)
        lines.append(line)
    notes = [column.about, *dict.fromkeys(_notes(rows, column, ours))]
    title = quantity.title[0].upper() + quantity.title[1:]
    return ReportTable(title=title, header=header, rows=lines, note=" ".join(filter(None, notes)))


def _rate(number: Measured) -> str:
    if number.rate is None:
        return "-"
    return f"{number.rate:g}{' (edge)' * number.at_edge}"


def _shares(table: Table, column: Column) -> list[str]:
    name = next((row.title for row in table.rows if row.method == table.reference), "")
    what = f"over {name}" if column.is_score else f"as a share of {name}'s"
    return [f"paper, {what}", f"ours, {what}"] + ([] if column.is_score else ["difference"])


def _relative(table: Table, column: Column, row: Row, ours: Ours) -> list[str]:
    """Return both as a share of the reference method's on the same model, and their difference."""
    reference = _reference(table, column, row, ours)
    if reference is None:
        return ["-"] * (2 if column.is_score else 3)
    key = column.quantity.key
    here = share(column, ours[row.key, key].value, ours[reference.key, key].value)
    if column.paper.key not in row.values:
        return ["-", f"{here:+.3g}"] if column.is_score else ["-", f"{here:.2f}", "-"]
    stated = share(column, row.values[column.paper.key], reference.values[column.paper.key])
    if column.is_score:
        return [f"{stated:+.2f}", f"{here:+.3g}"]
    return [f"{stated:.2f}", f"{here:.2f}", f"{here - stated:+.2f}"]


def _reference(table: Table, column: Column, row: Row, ours: Ours) -> Row | None:
    for other in table.rows:
        known = column.paper.key in other.values and (other.key, column.quantity.key) in ours
        if other.method == table.reference and other.model == row.model and known:
            return other
    return None


def _difference(column: Column, paper: float | None, here: float) -> str:
    if paper is None:
        return "-"
    return f"{here - paper:+.2f}" if column.is_score else f"{here / paper - 1:+.1%}"


def _notes(rows: list[Row], column: Column, ours: Ours) -> Iterator[str]:
    for row in rows:
        note = ours[row.key, column.quantity.key].note
        if note:
            model = row.model if column.is_same else column.model
            yield f"{model}, {name_of(row, column.rank(row))}: {note}."


def _chart(column: Column, rows: list[Row], ours: Ours) -> Chart:
    models = list(dict.fromkeys(row.model for row in rows))
    has_same_ranks = all(column.rank(row) == row.rank for row in rows)
    names = [
        " ".join(
            part
            for part in (
                row.model if len(models) > 1 else "",
                row.title,
                f"r={row.rank}" if row.rank is not None and has_same_ranks else "",
            )
            if part
        )
        for row in rows
    ]
    here = "here" if column.is_same else f"here: {column.model}"
    draw = partial(
        bars,
        names,
        [row.values.get(column.paper.key) for row in rows],
        [ours[row.key, column.quantity.key] for row in rows],
        (
            f"{column.paper.title}, {column.paper.unit}",
            f"{column.quantity.title}, {column.quantity.unit}",
        ),
        (f"the paper: {models[0]}" if len(models) == 1 else "the paper", here),
    )
    return Chart(caption=f"{column.quantity.title}: the paper and {here}", draw=draw)


def _with_spread(number: Measured) -> str:
    if number.low == number.high:
        return _number(number.value)
    return f"{_number(number.value)} ({_number(number.low)} to {_number(number.high)})"


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
