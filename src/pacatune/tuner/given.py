"""Looks up the columns that a configuration gives a module, by its name or by a pattern."""

from collections.abc import Mapping
from typing import Any

from peft.utils.other import get_pattern_key

from pacatune.format.options import PacaOptions, target_of

__all__ = ["given_for", "given_to", "key_of_columns"]


def given_for(config: PacaOptions, name: str) -> dict[str, list[Any] | None]:
    """Return the columns and the rates that a configuration gives a module, None if none."""
    return {
        "columns": given_to(config.columns, name),
        "rates": given_to(config.column_rates, name),
    }


def given_to(given: Mapping[str, list[Any]] | None, name: str) -> list[Any] | None:
    """Return what one of them gives a module, None if nothing."""
    key = key_of_columns(given, name) if given else None
    return None if key is None else (given or {})[key]


def key_of_columns(columns: Mapping[str, list[Any]], name: str) -> str | None:
    """Return the key under which a configuration gives a module's columns, None if it does not."""
    # Full names first: patterns of many modules would be compiled for each of them.
    for one in (name, target_of(name)):
        if one in columns:
            return one
    keys = [str(get_pattern_key(columns.keys(), one)) for one in (name, target_of(name))]
    return next((key for key in keys if key in columns), None)
