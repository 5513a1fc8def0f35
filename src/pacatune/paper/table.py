"""What a table or figure of the paper is made of; plain data."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

__all__ = ["METHOD_TITLES", "Quantity", "Row", "Table", "rows_of"]

METHOD_TITLES = {
    "none": "No tuning",
    "quantized": "Quantized, no tuning",
    "full": "Full-FT",
    "lora": "LoRA",
    "dora": "DoRA",
    "moslora": "MosLoRA",
    "qlora": "QLoRA",
    "paca": "PaCA",
    "qpaca": "QPaCA",
}
Kind = Literal["size", "memory", "time", "score", "length", "rate", "operations"]


@dataclass(frozen=True, kw_only=True)
class Quantity:
    """A column of numbers."""

    key: str
    title: str
    unit: str
    kind: Kind
    """Sizes are counted; memory and time are costs; scores, lengths and rates are better high."""
    margin: float = 0.0
    """Rows that differ by no more than this are equal for the paper: what its rounding hides, or
    what its text calls comparable."""

    @property
    def is_better_high(self) -> bool:
        """Whether more is better."""
        return self.kind in ("score", "length", "rate")


@dataclass(frozen=True, kw_only=True)
class Row:
    """A line: one method on one model, with what the paper reports of it."""

    model: str
    """A preset of `pacatune.memory.presets`, or the paper's name of an image model."""
    method: str
    """A key of `METHOD_TITLES`."""
    rank: int | None = None
    variant: str = ""
    """What distinguishes lines of one method."""
    values: Mapping[str, float]
    """Key of a quantity -> number, as printed; what is not printed is not there."""

    @property
    def key(self) -> str:
        """A name that is unique in the table and fit for files."""
        rank = "" if self.rank is None else f"r{self.rank}"
        return "-".join(part for part in (self.model, self.method, rank, self.variant) if part)

    @property
    def title(self) -> str:
        """The method as the paper names it."""
        title = METHOD_TITLES[self.method]
        return f"{title}, {self.variant.replace('-', ' ')}" if self.variant else title


@dataclass(frozen=True, kw_only=True)
class Table:
    """One table or figure."""

    name: str
    """As on the command line: table1."""
    title: str
    place: str
    """Where in the paper, and which table holds its settings."""
    quantities: tuple[Quantity, ...]
    rows: tuple[Row, ...]
    reference: str = ""
    """Method that the others of the same model are compared with."""

    @property
    def label(self) -> str:
        """What the paper calls it."""
        return f"Table {self.name.removeprefix('table')}"

    def quantity(self, key: str) -> Quantity:
        """Return a column by its key."""
        return next(quantity for quantity in self.quantities if quantity.key == key)

    def row(self, key: str) -> Row:
        """Return a line by its key."""
        return next(row for row in self.rows if row.key == key)

    def methods(self) -> list[str]:
        """Return the methods, in the order of the lines."""
        return list(dict.fromkeys(row.method for row in self.rows))


def rows_of(
    quantities: tuple[Quantity, ...],
    model: str,
    *lines: tuple[str, int | None, tuple[float | None, ...]],
) -> tuple[Row, ...]:
    """Return lines of one model; None where the paper prints a dash.

    Args:
        quantities: Columns, in the order of the numbers.
        model: Of all lines.
        *lines: Method, rank and numbers of each.
    """
    keys = [quantity.key for quantity in quantities]
    return tuple(
        Row(
            model=model,
            method=method,
            rank=rank,
            values={k: v for k, v in zip(keys, numbers, strict=True) if v is not None},
        )
        for method, rank, numbers in lines
    )
