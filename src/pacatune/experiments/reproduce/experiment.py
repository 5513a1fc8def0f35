"""What every table and figure offers: its work, its settings, and its part of the report."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from pacatune.experiments.paper.settings import Settings
from pacatune.experiments.reproduce.cells import Cell
from pacatune.experiments.reproduce.section import Section

__all__ = ["Experiment", "Mode", "Results", "SettingsBeside"]

Mode = Literal["simulate", "small", "full"]
# Key of a cell -> what it computed.
Results = Mapping[str, dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class SettingsBeside:
    """The settings of one line of the paper beside those of a run of ours."""

    title: str
    """Of the line."""
    paper: Settings
    ours: Settings
    why: Mapping[str, str]
    """Name of a setting that differs, or that the paper leaves out -> why ours is what it is."""
    commands: tuple[str, ...] = ()
    """What runs, one line of a shell each."""


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
    settings: Callable[[Literal["small", "full"]], list[SettingsBeside]]
    """Ours beside the paper's."""
    cannot: Mapping[str, str]
    """Mode -> why it is not there."""
