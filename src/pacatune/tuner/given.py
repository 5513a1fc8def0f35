"""Looks up the columns that a configuration gives a module, by its name or by a pattern."""

from collections.abc import Mapping
from typing import Any

from peft.utils.other import get_pattern_key

from pacatune.format.options import Columns, target_of

__all__ = ["given_columns", "key_of_columns"]


def given_columns(columns: Columns | None, name: str) -> list[int] | list[list[int]] | None:
    """Return the columns that a configuration gives a module, None if it gives none."""
    key = key_of_columns(columns, name) if columns else None
    return None if columns is None or key is None else columns[key]


def key_of_columns(columns: Mapping[str, Any], name: str) -> str | None:
    """Return the key under which a configuration gives a module's columns, None if it does not."""
    # Full names first: patterns of many modules would be compiled for each of them.
    for one in (name, target_of(name)):
        if one in columns:
            return one
    keys = [str(get_pattern_key(columns.keys(), one)) for one in (name, target_of(name))]
    return next((key for key in keys if key in columns), None)
