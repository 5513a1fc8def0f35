"""Whether a run in a file of few bits moves its codes, said while there is time to stop it."""

import math
from collections import Counter
from collections.abc import Iterator
from typing import Any, cast

import torch
from rich.console import Console
from torch import nn
from transformers import TrainerCallback

from pacatune.files.folder import format_bytes
from pacatune.grid.checkpoint import FileColumns
from pacatune.grid.layers import PackedLayer
from pacatune.ops.whole import is_whole
from pacatune.patch.packed import open_packed
from pacatune.sync.adapted import base_of, layers_of
from pacatune.training.progress import show_warnings
from pacatune.tuner.layer import PacaLayer

_NUM_COLUMNS = 4
"""Columns of each weight that are looked at."""
_FIRST_STEP, _SHARE_OF_STEPS = 3, 20
_FEW = 0.25
"""Share of codes. Where fewer move, writing takes much of what was trained."""


class CodeWatch(TrainerCallback):
    """Warns once if a run will leave most trained columns at the codes that they began at.

    An element whose update is less than half a step keeps its code when it is written. Updates grow
    about as the root of the number of steps, so an early look tells how the run ends. It is taken
    after a twentieth of the steps and twice the warm-up, where no process has a part of the deltas.

    Args:
        model: The adapted model before its first step.
        path: The GGUF file, or the folder of few bits, that it was loaded from.
        console: Where to warn.
    """

    def __init__(self, model: nn.Module, path: str, console: Console) -> None:
        self._path, self._console = path, console
        self._columns = list[tuple[PacaLayer, str, FileColumns]]()
        try:
            self._columns.extend(_first_columns(model, path))
        except ValueError as error:  # a format or an order of rows that is not known
            said = f"what is trained here cannot become codes of the file: {error}"
            show_warnings([said], console)

    @torch.no_grad()
    def on_step_end(self, args: Any, state: Any, *_: Any, **__: Any) -> None:
        """Look once, and count the codes that will have moved in the end."""
        step, last = state.global_step, state.max_steps
        first = max(_FIRST_STEP, last // _SHARE_OF_STEPS, 2 * args.get_warmup_steps(last))
        if not self._columns or step < min(first, last):
            return
        now, at_the_end = map(self._share_moved, (1, (last / step) ** 0.5))
        self._columns.clear()
        if at_the_end < _FEW:
            said = (
                f"after {step} of {last} steps {now:.1%} of the trained codes of {self._path} "
                f"would move, and about {at_the_end:.0%} will at the end; updates of less than "
                "half a step of the file are lost when it is written. Lower `paca.r` beside the "
                "same `paca.paca_alpha` (updates are alpha / r times as large), or raise "
                "`training.learning_rate`."
            )
            show_warnings([said], self._console)

    def _share_moved(self, times: float) -> float:
        """Return the share of codes that move if updates are so many times as large as now."""
        num_codes = num_moved = 0
        for layer, adapter, coded in self._columns:
            update = layer.update_of(adapter)
            if is_whole(update.delta, 2):
                delta = update.dense()[:, :_NUM_COLUMNS]
                codes = coded.moved(delta, times * update.scaling).after
                num_codes += codes.numel()
                num_moved += int((coded.before != codes).sum())
        return num_moved / num_codes if num_codes else 1.0


def about_weights(model: nn.Module, why_not_packed: str) -> str:
    """Say what the weights of a file of few bits take, and what they would take otherwise."""
    tensors = [*model.parameters()]
    packed = [layer for layer in model.modules() if isinstance(layer, PackedLayer)]
    in_blocks = {id(layer.blocks): layer for layer in packed}  # a tied head has the embedding's
    here = sum(tensor.nbytes for tensor in tensors)
    if not packed:
        why = why_not_packed or "`model.packed` keeps those of the file"
        return f"weights: dequantised, {format_bytes(here)}; {why}"
    plain = here - sum(layer.blocks.nbytes for layer in in_blocks.values())
    plain += sum(math.prod(layer.shape) * layer.dtype.itemsize for layer in in_blocks.values())
    kinds = Counter(layer.grid.name for layer in in_blocks.values()).most_common()
    names = ", ".join(kind for kind, _ in kinds)
    return f"weights: they stay in {names}, {format_bytes(here)} instead of {format_bytes(plain)}"


def _first_columns(model: nn.Module, path: str) -> Iterator[tuple[PacaLayer, str, FileColumns]]:
    """Yield the first trained columns of each weight that is in codes."""
    checkpoint = open_packed(path)
    config = cast(Any, base_of(model)).config.get_text_config()
    for parameter, layer, adapter in layers_of(model, None):
        base = layer.get_base_layer()
        if not (isinstance(base, nn.Linear) and is_whole(base.weight, 2)):
            continue
        indices = layer.paca_indices[adapter][:_NUM_COLUMNS]
        columns = base.weight.index_select(1, indices)
        coded = FileColumns(checkpoint, parameter, columns, indices, config)
        if coded.grid is not None:
            yield layer, adapter, coded
