"""One experiment's part of the report, as data that Markdown, HTML and JSON are made of."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any, Literal

from pacatune.reports.tables import ReportTable

__all__ = ["ORIGINS", "OUTCOMES", "Chart", "Measured", "Origin", "Outcome", "Section", "Verdict"]


Origin = Literal["simulated", "counted", "measured"]
ORIGINS: tuple[Origin, ...] = ("simulated", "counted", "measured")


@dataclass(frozen=True, kw_only=True)
class Measured:
    """A number and the interval it lies in; equal ends where it is exact."""

    value: float
    low: float
    high: float
    origin: Origin
    """simulated: by `pacatune estimate`; counted: exactly, of the real step; measured: here."""
    note: str = ""
    """What a reader must know about this one number."""
    rate: float | None = None
    """The best learning rate of a grid, where there was one."""
    at_edge: bool = False
    """Whether that is the smallest or largest of its grid: a better one may lie outside."""

    @classmethod
    def exact(cls, value: float, origin: Origin, note: str = "") -> "Measured":
        """Return a number without spread."""
        return cls(value=value, low=value, high=value, origin=origin, note=note)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Measured":
        """Return the number that `to_dict` wrote."""
        return cls(**values)


Outcome = Literal["agrees", "cannot_tell", "open", "contradicts"]
OUTCOMES: tuple[Outcome, ...] = ("agrees", "cannot_tell", "open", "contradicts")
"""cannot_tell: our intervals are wider than the paper's difference; open: they are not, and the
lines are alike here where the paper has an order."""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What two lines say about the paper in one quantity."""

    outcome: Outcome
    origin: Origin
    """Where our numbers come from."""
    text: str


@dataclass(frozen=True, kw_only=True)
class Chart:
    """A picture."""

    caption: str
    draw: Callable[[], str]
    """Draws it as SVG; only called for what is written."""

    @cached_property
    def svg(self) -> str:
        """The whole file."""
        return self.draw()


@dataclass(kw_only=True)
class Section:
    """One table or figure: the paper's, ours, and what follows."""

    name: str
    title: str
    place: str
    """Where in the paper."""
    about: list[str]
    """Paragraphs for somebody who knows neither the paper nor us."""
    tables: list[ReportTable] = field(default_factory=list)
    charts: list[Chart] = field(default_factory=list)
    verdicts: list[Verdict] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    """What limits the comparison."""
    missing: list[str] = field(default_factory=list)
    """Cells that have no result yet."""
    failures: dict[str, str] = field(default_factory=dict)
    """Cell -> why it has none."""
    provenance: str = ""
    numbers: dict[str, Any] = field(default_factory=dict)
    """What the JSON file holds beside the texts: the numbers themselves."""

    rates: dict[str, bool] = field(default_factory=dict)
    """Line whose learning rate is the best of a grid -> whether it lies at the grid's edge."""

    def outcomes(self, origin: Origin | None = None) -> dict[str, int]:
        """Return how many verdicts there are of each kind, of one origin or of all."""
        kinds = [v.outcome for v in self.verdicts if origin in (None, v.origin)]
        return {kind: kinds.count(kind) for kind in OUTCOMES}

    @property
    def origins(self) -> list[Origin]:
        """Where the numbers of the verdicts come from."""
        return [origin for origin in ORIGINS if any(v.origin == origin for v in self.verdicts)]
