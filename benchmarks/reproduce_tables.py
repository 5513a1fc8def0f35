"""Tables of docs/reproduce.md, from the committed results of the small scale."""

from collections.abc import Sequence
from pathlib import Path

from benchmarks.pages import read_sections
from pacatune.experiments.reproduce.experiment import Section
from pacatune.experiments.reproduce.page import outcomes_table
from pacatune.reports.tables import table_lines

OURS = ("PaCA", "QPaCA")


def table(kind: str, results: Path) -> str:
    """Return a table: outcomes of comparisons and minutes, or PaCA's shares of the references."""
    tables = {"outcomes": outcomes, "shares": shares}
    if kind not in tables:
        raise ValueError(f"no table {kind!r} of the reproduction; there are {', '.join(tables)}.")
    return "\n".join(tables[kind](read_sections("small", results)))


def outcomes(sections: Sequence[Section]) -> list[str]:
    """Return the lines of the table of outcomes, with the minutes of each name."""
    shown = outcomes_table(sections)
    minutes = {section.name: f"{_seconds(section) / 60:.1f}" for section in sections}
    rows = [
        [f"`{row[0]}`" if row[0] else "", *row[1:], minutes.get(row[0], "")] for row in shown.rows
    ]
    return table_lines([*shown.header, "minutes"], rows, "llr")


def _seconds(section: Section) -> float:
    return sum(cell["seconds"] for cell in section.numbers["cells"].values())


def shares(sections: Sequence[Section]) -> list[str]:
    """Return the lines of the table of PaCA's shares, each with the model of ours."""
    rows = []
    for section in sections:
        for one in section.tables:
            heads = one.header
            columns = [head for head in heads if ", as a share of" in head or ", over" in head]
            if len(columns) != 2:
                continue
            paper, ours = (heads.index(head) for head in columns)
            model, method = heads.index("model"), heads.index("method")
            row = next((row for row in one.rows if row[method] in OURS), None)
            if row is not None:
                what = one.title[0].lower() + one.title[1:]
                against = columns[0].partition(", ")[2]
                numbers = [row[paper], row[ours], row[model]]
                rows.append([f"`{section.name}`", f"{what}, {against}", *numbers])
    return table_lines(["", "of PaCA", "the paper", "here", "here on"], rows, "llrrl")
