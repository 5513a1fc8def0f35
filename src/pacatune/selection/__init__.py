"""Which columns of a weight are trained: strategies, what they must know, fixed choices."""

from pacatune.lazy import import_later
from pacatune.strategies import (
    register_strategy,
    seed_for,
    select_columns,
    strategies,
)

__all__ = [
    "ColumnStatistics",
    "choose_columns",
    "collect_statistics",
    "load_columns",
    "register_strategy",
    "save_columns",
    "seed_for",
    "select_columns",
    "strategies",
]

# The tuner needs the strategies, and these need the tuner, to know what is adapted.
__getattr__, __dir__ = import_later(
    __name__, __all__, (".statistics", ".collect", "..tuner.columns")
)
