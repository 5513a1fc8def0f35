"""Exact counts beside the times: what is kept for backward, and how often columns are written."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import nn

from benchmarks.methods import OURS
from pacatune.residency import put as residency


def formula_bytes(
    layers: dict[nn.Module, str], num_tokens: int | dict[nn.Module, int], dtype: torch.dtype
) -> dict[str, int]:
    """Return what PaCA has to keep: N * R elements per layer, by kind of layer.

    N is `num_tokens`, of all layers or of each; for a convolution all positions of all images.
    """
    totals = dict.fromkeys(layers.values(), 0)
    for layer, kind in layers.items():
        (rank,) = layer.r.values()
        number = num_tokens if isinstance(num_tokens, int) else num_tokens[layer]
        totals[kind] += number * rank * dtype.itemsize
    return totals


@contextmanager
def count_column_writes() -> Iterator[Callable[[], int]]:
    """Count how often columns are written into a weight, restoring included."""
    write, done = residency._put_columns_, []

    def counting(*args: Any) -> None:
        # A mock would keep the arguments; a held alias of a weight forbids writing it.
        done.append(None)
        write(*args)

    with patch.object(residency, "_put_columns_", counting):
        yield lambda: len(done)


def check_bytes(rows: list[dict[str, Any]]) -> None:
    """Add what each method keeps beyond the frozen model; refuse a PaCA that misses its formula.

    Rows of `frozen` may be missing, and PaCA's formula where it does not apply.
    """
    frozen = {row["setting"]: row["saved_bytes"] for row in rows if row["method"] == "frozen"}
    for row in rows:
        beyond = None
        if row["setting"] in frozen:
            beyond = row["saved_bytes"] - frozen[row["setting"]]
            row["saved_bytes_beyond_frozen"] = beyond
        if row["method"] != OURS or "formula_bytes_by_layer" not in row:
            continue  # compiled graphs decide themselves what to keep
        kept, formula = row["saved_bytes_by_layer"], row["formula_bytes_by_layer"]
        if kept != formula or beyond not in (None, sum(formula.values())):
            raise RuntimeError(
                f"{row['setting']}: paca keeps {kept} bytes in its layers, and {beyond} beyond the "
                f"frozen model; N * R * itemsize gives {formula}, so something else is saved."
            )
