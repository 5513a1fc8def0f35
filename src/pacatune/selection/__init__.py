"""Which columns of a weight are trained: strategies, what they must know, fixed choices."""

from typing import Any

from pacatune.strategies import (
    register_strategy,
    seed_for,
    select_columns,
    strategies,
)

__all__ = [
    "ColumnStatistics",
    "ReselectColumns",
    "allocate_ranks",
    "choose_columns",
    "collect_statistics",
    "concentrate_ranks",
    "load_columns",
    "register_strategy",
    "save_columns",
    "seed_for",
    "select_columns",
    "share_columns",
    "strategies",
]

# The tuner needs the strategies, and these need the tuner, to know what is adapted.
_LATER = {
    "ColumnStatistics": "pacatune.selection.statistics",
    "ReselectColumns": "pacatune.selection.reselect",
    "allocate_ranks": "pacatune.selection.budget",
    "choose_columns": "pacatune.tuner.columns",
    "collect_statistics": "pacatune.selection.collect",
    "concentrate_ranks": "pacatune.selection.budget",
    "load_columns": "pacatune.selection.statistics",
    "save_columns": "pacatune.selection.statistics",
    "share_columns": "pacatune.selection.sharing",
}


def __getattr__(name: str) -> Any:
    if name in _LATER:
        from importlib import import_module

        return getattr(import_module(_LATER[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
