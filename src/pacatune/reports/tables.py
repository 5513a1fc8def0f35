"""Tables in Markdown."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

_RULES = {"l": "---", "r": "--:"}


@dataclass(frozen=True, kw_only=True)
class ReportTable:
    """A table of texts, which pages and Markdown show alike."""

    title: str
    header: list[str]
    rows: list[list[str]]
    note: str = ""
    """What a reader must know of it, shown below."""
    align: str = "llr"
    """As for `table_lines`."""

    @property
    def alignment(self) -> str:
        """One letter per column."""
        return _extended(self.align, len(self.header))

    def lines(self) -> list[str]:
        """Return head, rule and rows as lines of Markdown; title and note are the page's."""
        return table_lines(self.header, self.rows, self.align)


def table_lines(
    header: Sequence[str], rows: Iterable[Sequence[str]], align: str = "lr"
) -> list[str]:
    """Return a table of Markdown cells as lines.

    `align` has `l` or `r` for each column; the last letter holds for all that follow.
    """
    # An empty title takes one space, as in a table written by hand.
    lines = [
        _line(header).replace("|  |", "| |"),
        f"|{'|'.join(_RULES[a] for a in _extended(align, len(header)))}|",
    ]
    for row in rows:
        if len(row) != len(header):
            raise ValueError(
                f"a row has {len(row)} cells, the header {len(header)} ({', '.join(header)}): "
                f"{list(row)}; give one cell for each column."
            )
        lines.append(_line(row))
    return lines


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _extended(align: str, num_columns: int) -> str:
    return (align + align[-1] * num_columns)[:num_columns]
