"""Exact counts beside the times: what is kept for backward, and how often columns are written."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import nn

from pacatune.residency import put as residency


def formula_bytes(
    layers: dict[nn.Module, str], num_tokens: int, dtype: torch.dtype
) -> dict[str, int]:
    """Return what PaCA has to keep: N * R elements per layer of `num_tokens`, by kind of layer."""
    totals = dict.fromkeys(layers.values(), 0)
    for layer, kind in layers.items():
        (rank,) = layer.r.values()
        totals[kind] += num_tokens * rank * dtype.itemsize
    return totals


@contextmanager
def count_column_writes() -> Iterator[Callable[[], int]]:
    """Count how often columns are written into a weight, restoring included."""
    write, done = residency.put_columns_, []

    def counting(*args: Any) -> None:
        # A mock would keep the arguments; a held alias of a weight forbids writing it.
        done.append(None)
        write(*args)

    with patch.object(residency, "put_columns_", counting):
        yield lambda: len(done)


def hold_bytes(
    kept: dict[str, int],
    layers: dict[nn.Module, str],
    num_tokens: int,
    dtype: torch.dtype,
) -> None:
    """Refuse a PaCA whose layers keep a byte more, or less, than the formula gives."""
    formula = formula_bytes(layers, num_tokens, dtype)
    if kept != formula:
        raise RuntimeError(
            f"paca keeps {kept} bytes in its layers; N * R * itemsize gives {formula}, so "
            "something else is saved."
        )
