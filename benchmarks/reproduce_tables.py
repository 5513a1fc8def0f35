"""Tables of docs/reproduce.md, from the committed report of the small scale."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

FILE = "reproduce-small/all.json"
OURS = ("PaCA", "QPaCA")


def table(kind: str, results: Path) -> str:
    """Return one of the Markdown tables.

    Args:
        kind: `outcomes`: comparisons by outcome, and minutes; `shares`: PaCA's line against the
            reference of each table.
        results: Folder with the committed results.

    Raises:
        ValueError: If there is no such table.
    """
    report: dict[str, Any] = json.loads((results / FILE).read_text(encoding="utf-8"))
    if kind == "outcomes":
        return "\n".join(_outcomes(report))
    if kind == "shares":
        return "\n".join(_shares(report))
    raise ValueError(f"no table {kind!r} of the reproduction; there are outcomes and shares.")


def _outcomes(report: dict[str, Any]) -> Iterator[str]:
    yield "| | agree | open | contradict | minutes |"
    yield "|---|--:|--:|--:|--:|"
    for name, part in report.items():
        seconds = sum(cell["seconds"] for cell in part["cells"].values())
        found = part["outcomes"]
        yield (
            f"| `{name}` | {found['agrees']} | {found['open']} | {found['contradicts']} | "
            f"{seconds / 60:.1f} |"
        )


def _shares(report: dict[str, Any]) -> Iterator[str]:
    yield "| | of PaCA | the paper | here |"
    yield "|---|---|--:|--:|"
    for name, part in report.items():
        for one in part["tables"]:
            heads = one["header"]
            columns = [head for head in heads if ", as a share of" in head or ", over" in head]
            if len(columns) != 2:
                continue
            paper, ours = (heads.index(head) for head in columns)
            method = heads.index("method")
            row = next((row for row in one["rows"] if row[method] in OURS), None)
            if row is not None:
                what = one["title"][0].lower() + one["title"][1:]
                against = columns[0].partition(", ")[2]
                yield f"| `{name}` | {what}, {against} | {row[paper]} | {row[ours]} |"
