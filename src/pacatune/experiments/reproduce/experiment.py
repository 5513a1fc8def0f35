"""A table or figure of the paper: its work in cells, its settings, its part of the report."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from pacatune.experiments.reproduce.settings import SettingsBeside
from pacatune.reports.tables import ReportTable

Mode = Literal["simulate", "small", "full"]
Scale = Literal["small", "full"]
Result = dict[str, Any]
Results = Mapping[str, Result]
"""Key of a cell -> what it computed."""
Origin = Literal["simulated", "counted", "measured"]
ORIGINS: tuple[Origin, ...] = ("simulated", "counted", "measured")
Outcome = Literal["agrees", "cannot_tell", "open", "contradicts"]
OUTCOMES: tuple[Outcome, ...] = ("agrees", "cannot_tell", "open", "contradicts")
"""cannot_tell: our intervals are wider than the paper's difference; open: they are not, and the
lines are alike here where the paper has an order."""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One piece of work, whose result is kept."""

    key: str
    """Unique in its experiment; the name of its file."""
    title: str
    """What it does, for a line on the screen."""
    methods: tuple[str, ...]
    """Methods that it is about, for --only."""
    inputs: dict[str, Any]
    """Everything that decides the result, as JSON values: a kept result of others is not used."""
    run: Callable[[Path, Callable[[str], None]], Result]
    """Called with a folder of its own, which survives a kill, and with what shows a line."""


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

    def over(self, other: "Measured") -> "Measured":
        """Return the share of another number, with the widest interval."""
        return Measured(
            value=self.value / other.value,
            low=self.low / other.high,
            high=self.high / other.low,
            origin=self.origin,
        )

    def text(self, show: Callable[[float], str], spread: str = " [{}, {}]") -> str:
        """Return the number, and its interval where it has one."""
        ends = spread.format(show(self.low), show(self.high)) if self.low < self.high else ""
        return show(self.value) + ends


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
    """One experiment's part of the report, of which Markdown, HTML and JSON are made."""

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


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """A table or figure of the paper."""

    name: str
    """On the command line."""
    title: str
    place: str
    """Where in the paper, and where its settings are."""
    methods: tuple[str, ...]
    """What --only takes."""
    cells: Callable[[Mode], list[Cell]]
    """The work of a mode."""
    section: Callable[[Mode, Results], Section]
    """The report on what there is."""
    settings: Callable[[Scale], list[SettingsBeside]]
    """Ours beside the paper's."""
    cannot: Mapping[str, str] = field(default_factory=dict)
    """Mode -> why it is not there."""
