"""What the paper says: its tables with their settings, and its text on Figures 2 and 3.

S. Woo et al., PaCA: Partial Connection Adaptation for Efficient Fine-Tuning, ICLR 2025. Numbers are
in paper.json, as printed; nothing is read off bars or curves. A line there has model, method,
variant, rank, a number for each quantity in `units` (null: a dash), and settings of its own.

Points are of MT-Bench, 1 to 10 by GPT4o-mini; the text calls 5.12 to 5.28 comparable (section 4.2).
Table 4 is printed in thousands of tokens, the times of 70B in hours.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pacatune.methods import METHODS
from pacatune.reports.rows import Row

MODEL = "llama3-8b"
"""The model of most tables and of both figures."""
METHOD_TITLES = {
    "none": "No tuning",
    "quantized": "Quantized, no tuning",
    **{name: method.title for name, method in METHODS.items()},
    "moslora": "MosLoRA",
    "full": "Full-FT",
}
"""Methods of the paper's tables -> what they are called."""


@dataclass(frozen=True, kw_only=True)
class Line:
    """One method on one model, with what the paper reports of it."""

    model: str
    """A preset of `pacatune.measure.presets`, or the paper's name of an image model."""
    method: str
    """A key of `METHOD_TITLES`."""
    variant: str = ""
    """What distinguishes lines of one method."""
    rank: int | None = None
    values: Mapping[str, float]
    """Quantity -> number, as printed; what is not printed is not there."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Hyper-parameters of Tables 9 to 12; what the paper does not say is not there.

    All are in 16-bit mixed precision, and adapt Q, K, V, O, Up, Down and Gate. `batch_size` is
    over all `micro_batches`, `seq_len` of the longest text, `warmup` in steps or, below 1, a
    share; several `learning_rates` are a grid, of which the best counts.
    """

    @property
    def key(self) -> str:
        """A name that is unique in the table and fit for files."""
        rank = "" if self.rank is None else f"r{self.rank}"
        return "-".join(part for part in (self.model, self.method, rank, self.variant) if part)

    @property
    def title(self) -> str:
        """What tells the line from others of its model, as the paper names it."""
        rank = "" if self.rank is None else f"r = {self.rank}"
        parts = (METHOD_TITLES[self.method], rank, self.variant.replace("-", " "))
        return ", ".join(filter(None, parts))


@dataclass(frozen=True, kw_only=True)
class Printed:
    """A table or figure of the paper."""

    name: str
    """As on the command line: table1."""
    title: str
    place: str
    """Where in the paper, and which table holds its settings."""
    reference: str | None = None
    """Line that the others of its model are compared with: the first whose title begins so."""
    note: str = ""
    """What else the authors published."""
    units: Mapping[str, str] = field(default_factory=dict)
    """Quantity of the lines -> its unit."""
    lines: tuple[Line, ...] = ()
    claims: tuple[Row, ...] = ()
    """Statements of the text."""

    @property
    def scores(self) -> set[str]:
        """Quantities of which more is better and differences are compared, not shares."""
        return {what for what, unit in self.units.items() if unit in ("%", "points")}

    @property
    def trained(self) -> list[Line]:
        """The lines that are fine-tuned."""
        return [line for line in self.lines if line.method in METHODS]

    @property
    def rows(self) -> list[Row]:
        """All numbers that are printed, and those of the text."""
        rows = list(self.claims)
        for line in self.lines:
            names: dict[str, Any] = {"method": line.title, "model": line.model, "origin": "paper"}
            for what, value in line.values.items():
                rows.append(Row(what=what, value=value, unit=self.units[what], **names))
        return rows


def _read(name: str, values: dict[str, Any]) -> Printed:
    units, shared = values.get("units", {}), values.pop("settings", {})
    lines = [
        Line(
            model=model,
            method=method,
            variant=variant,
            rank=rank,
            values={w: float(n) for w, n in zip(units, numbers, strict=True) if n is not None},
            settings={"rank": rank} | shared | (own[0] if own else {}),
        )
        for model, method, variant, rank, numbers, *own in values.pop("lines", ())
    ]
    claims = [Row(model=MODEL, origin="paper", **claim) for claim in values.pop("claims", ())]
    return Printed(name=name, lines=tuple(lines), claims=tuple(claims), **values)


PAPER = {
    name: _read(name, values)
    for name, values in json.loads(Path(__file__).with_suffix(".json").read_text("utf-8")).items()
}
"""Name, as on the command line -> table or figure."""
