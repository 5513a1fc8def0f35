"""Numbers, and the tables that show them.

Whatever is measured, simulated, trained or printed in a paper is a `Row`; `table` is their only
pivot. A number is formatted once, here.
"""

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

from pacatune.files.folder import format_bytes

Origin = Literal["paper", "measured", "counted", "simulated"]
"""`counted` is exact and repeatable; `measured` is of a clock or a trained model; `simulated` is
computed for a device or size that is not here; `paper` is as printed."""

_TIMES = ("ms", "us", "s", "min", "h")
_MISSING = "-"
# The 97.5 % quantiles of Student's t, of one degree of freedom and more.
_T_95 = (12.71, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
_RULES = {"l": "---", "r": "--:"}


@dataclass(frozen=True, kw_only=True)
class Row:
    """One number, with all that a table or a reader has to know of it."""

    what: str
    """The quantity: `step`, `kept for backward`, `accuracy`, ..."""
    method: str
    """Method or arm, or `paca / lora` of a ratio."""
    value: float
    unit: str = ""
    """`ms`, `bytes`, `%`, `ratio`, `tokens/s`, ...; empty for a plain count."""
    model: str = ""
    setting: str = ""
    """What else tells it from the rows beside it, such as `2 x 512 tokens, bfloat16`."""
    low: float | None = None
    high: float | None = None
    """Ends of the interval that it lies in; None where no spread is known. A count has none."""
    n: int = 1
    """Rounds, seeds, examples: what the number is a median or mean of."""
    each: Mapping[str, float] = field(default_factory=dict)
    """What it is the mean of, by seed or question; empty where not kept."""
    origin: Origin = "measured"
    note: str = ""
    """What a reader must know of this one number, shown below the table."""

    def __post_init__(self) -> None:
        if (self.low is None) != (self.high is None):
            raise ValueError(f"{self.what} of {self.method}: an interval has two ends.")
        if self.low is not None and self.high is not None and self.low > self.high:
            raise ValueError(
                f"{self.what} of {self.method}: the interval [{self.low}, {self.high}] is empty."
            )

    @property
    def is_exact(self) -> bool:
        """Whether nothing of it is left to chance."""
        return self.origin in ("counted", "paper")

    @property
    def has_interval(self) -> bool:
        """Whether its spread is known."""
        return self.low is not None

    def text(self) -> str:
        """Return the number with its interval, without the unit that heads its column."""
        shown = number_text(self.value, self.unit)
        if self.low is None or self.high is None or self.low == self.high:
            return shown
        low, high = (number_text(end, self.unit) for end in (self.low, self.high))
        return f"{shown} ({low} to {high})"

    def over(self, other: "Row") -> "Row":
        """Return the share of another number, with the widest interval; none if one has none."""
        if not other.value:
            raise ZeroDivisionError(
                f"{other.what} of {other.method} is 0: nothing is a share of 0."
            )
        low = high = None
        ends = [
            (row.value, row.value) if row.is_exact else (row.low, row.high) for row in (self, other)
        ]
        (a, b), (c, d) = ends
        if a is not None and b is not None and c and d:
            low, high = a / d, b / c
        return replace(
            self,
            method=f"{self.method} / {other.method}",
            value=self.value / other.value,
            unit="ratio",
            low=low,
            high=high,
            n=min(self.n, other.n),
            each={},
        )

    def minus(self, other: "Row") -> "Row":
        """Return the difference, with a 95 % interval.

        Where both keep what they are means of, of the same seeds or questions, the differences are
        taken one by one. Otherwise the interval is the widest that their own allow.
        """
        low = high = None
        value = self.value - other.value
        are_paired = self.each.keys() == other.each.keys()
        each = (
            {key: number - other.each[key] for key, number in self.each.items()}
            if are_paired
            else {}
        )
        if len(each) > 1:
            spread = spread_of_mean([*each.values()])
            low, high = value - spread, value + spread
        elif None not in (self.low, self.high, other.low, other.high):
            low, high = self.low - other.high, self.high - other.low  # type: ignore[operator]
        return replace(
            self,
            method=f"{self.method} - {other.method}",
            value=value,
            low=low,
            high=high,
            n=min(self.n, other.n),
            each=each,
        )

    def to_dict(self) -> dict[str, Any]:
        """Return what a file holds: the fields that have not their defaults."""
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "each"}
        usual = {f.name: f.default for f in fields(self)}
        kept = {name: value for name, value in values.items() if value != usual[name]}
        return kept | ({"each": dict(self.each)} if self.each else {})


def spread_of_mean(values: Sequence[float]) -> float:
    """Return half of the 95 % interval of a mean, by Student's t: twelve standard errors of two."""
    freedom = len(values) - 1
    quantile = _T_95[freedom - 1] if freedom <= len(_T_95) else 2.2 if freedom <= 30 else 2.0
    return quantile * statistics.stdev(values) / math.sqrt(len(values))


def number_text(value: float, unit: str = "") -> str:
    """Return a number as every table shows it; a unit that scales, as bytes do, stands with it."""
    if unit == "bytes":
        return format_bytes(value)
    if unit == "%":
        return f"{value:.2f}"
    if unit == "ratio":
        return f"{value:.3f}"
    if unit in _TIMES or not float(value).is_integer():
        return f"{value:,.0f}" if abs(value) >= 9999.5 else f"{value:.4g}"
    return f"{value:,.0f}"


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table of texts: on a terminal, in Markdown, in a document."""

    header: list[str]
    cells: list[list[str]]
    notes: list[str] = field(default_factory=list)
    """What a reader must know of single numbers."""
    num_index: int = 1
    """How many columns, from the first, are words."""

    def __post_init__(self) -> None:
        for row in self.cells:
            if len(row) != len(self.header):
                raise ValueError(
                    f"a line has {len(row)} cells, the header {len(self.header)} "
                    f"({', '.join(self.header)}): {row}; give one cell for each column."
                )

    def markdown(self) -> list[str]:
        """Return head, rule and lines."""
        sides = ["l" if place < self.num_index else "r" for place in range(len(self.header))]
        rule = f"|{'|'.join(_RULES[side] for side in sides)}|"
        # An empty cell takes one space, as in a table written by hand.
        head, *lines = (
            "".join(f"| {cell} " if cell else "| " for cell in cells) + "|"
            for cells in (self.header, *self.cells)
        )
        return [head, rule, *lines]

    def plain(self) -> list[str]:
        """Return lines of aligned text, which nothing cuts: numbers stay whole when piped."""
        every = [self.header, *self.cells]
        widths = [max(map(len, column)) for column in zip(*every, strict=True)]
        lines = []
        for cells in every:
            parts = [
                cell.ljust(width) if place < self.num_index else cell.rjust(width)
                for place, (cell, width) in enumerate(zip(cells, widths, strict=True))
            ]
            lines.append("  ".join(parts).rstrip())
        return lines


def table(rows: Iterable[Row], index: Sequence[str], columns: Sequence[str]) -> Table:
    """Lay rows out: a line for each value of the fields `index`, a column for each of `columns`.

    Lines and columns stand in the order of the rows. A unit that all numbers of a column share
    heads it.

    Raises:
        ValueError: If two numbers fall into one cell: name a field that tells them apart.
    """
    lines: dict[tuple[str, ...], dict[tuple[str, ...], Row]] = {}
    units: dict[tuple[str, ...], dict[str, None]] = {}
    for row in rows:
        line, column = (_key(row, names) for names in (index, columns))
        cells = lines.setdefault(line, {})
        if column in cells:
            raise ValueError(
                f"two numbers stand for {', '.join((*line, *column))}; tell them apart by another "
                "of the fields of Row."
            )
        cells[column] = row
        units.setdefault(column, {})[row.unit] = None
    return Table(
        header=[*index, *(_title(column, list(of)) for column, of in units.items())],
        cells=[
            [*line, *(cells[column].text() if column in cells else _MISSING for column in units)]
            for line, cells in lines.items()
        ],
        notes=list(
            dict.fromkeys(r.note for cells in lines.values() for r in cells.values() if r.note)
        ),
        num_index=len(index),
    )


def _key(row: Row, names: Sequence[str]) -> tuple[str, ...]:
    return tuple(str(getattr(row, name)) for name in names)


def _title(column: tuple[str, ...], units: list[str]) -> str:
    title = ", ".join(filter(None, column))
    shown = units[0] if len(units) == 1 and units[0] not in ("bytes", "ratio", "") else ""
    return f"{title}, {shown}" if shown else title
