"""Training on the codes of a file: what the model computes with is what the file can hold.

Beside a sampler that serves codes, the trainer's function is then the sampler's. Rates must be high
enough that codes move: a column is at the nearest ones to what the optimiser has reached.
"""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from pacatune.grid.checkpoint import PackedCheckpoint
from pacatune.grid.columns import CodedColumns
from pacatune.ops.columns import adapted_columns
from pacatune.sync.adapted import base_of, layers_of

_TRIES = 3


class _Trained(NamedTuple):
    delta: nn.Parameter
    coded: CodedColumns
    columns: Tensor
    """(O, R), the base's, on the CPU."""
    scaling: float
    reached: Tensor
    """(O, R), what the optimiser works on."""


class GridSteps:
    """Keeps a model's trained columns at values of codes, from one optimiser's step to the next.

    The optimiser's steps go to a copy of each delta in its own dtype; gradients are those at the
    codes' values. Checkpoints hold these values and not the copy, so a resumed run begins at them.
    Codes are searched on the CPU, for every trained element twice a step.

    Args:
        model: A PEFT model with a PaCA adapter, whose base was dequantised from the checkpoint into
            bfloat16 or float16.
        checkpoint: What `pacatune.patch.packed.open_packed` returns of the base.
        optimizer: What trains the adapter.

    Raises:
        ValueError: If values of codes could not be reached exactly: row groups, float32 weights, a
            factor alpha / r that is no power of two; or the base is another one.
    """

    def __init__(
        self, model: Any, checkpoint: PackedCheckpoint, optimizer: torch.optim.Optimizer
    ) -> None:
        self._trained = list(_trained(model, checkpoint))
        self._hooks = [
            optimizer.register_step_pre_hook(self._begin),
            optimizer.register_step_post_hook(self._end),
        ]
        self._end()

    def remove(self) -> None:
        """Leave the deltas where they are, to be trained freely."""
        for hook in self._hooks:
            hook.remove()

    @torch.no_grad()
    def _begin(self, *_: Any) -> None:
        for one in self._trained:
            one.delta.copy_(one.reached)

    @torch.no_grad()
    def _end(self, *_: Any) -> None:
        for one in self._trained:
            one.reached.copy_(one.delta)
            one.delta.copy_(_on_codes(one))


def _on_codes(one: _Trained) -> Tensor:
    """Return the (O, R) delta by which columns have just the values of their nearest codes."""

    def nearest(delta: Tensor) -> Tensor:
        codes = one.coded.moved(one.scaling * delta).after
        return one.coded.values(codes).to(one.columns.dtype)

    # Values are rounded to 16 bits, codes are counted from the file's: far from there, near to
    # zero, another code may be the nearest each time. Such an element ends at the base's.
    values = nearest(one.reached)
    for _ in range(_TRIES):
        delta = (values.float() - one.columns) / one.scaling
        previous, values = values, nearest(delta)
        if torch.equal(previous, values):
            break
    is_exact = (previous == values) & (adapted_columns(one.columns, delta, one.scaling) == values)
    return torch.where(is_exact, delta, 0.0)


def _trained(model: Any, checkpoint: PackedCheckpoint) -> Iterator[_Trained]:
    config = cast(Any, base_of(model)).config.get_text_config()
    for parameter, layer, adapter in layers_of(model, None):
        delta, indices, scaling, places = layer.update_of(adapter)
        weight, where = cast(Any, layer).get_base_layer().weight, f"{parameter!r}"
        name = checkpoint.name_of(parameter, config.num_hidden_layers)
        if checkpoint.grid(name) is None:  # plain numbers, which any step reaches
            continue
        if places is not None:
            raise ValueError(f"{where} has row groups; on codes train with `groups=1`.")
        if weight.itemsize != 2 or delta.dtype != torch.float32:
            raise ValueError(
                f"{where} is in {weight.dtype} and its delta in {delta.dtype}; on codes, load the "
                "base in bfloat16 and train deltas in float32."
            )
        if not math.log2(scaling).is_integer():
            raise ValueError(
                f"{where} has alpha / r = {scaling:g}, by which values of codes would be rounded; "
                "give a power of two."
            )
        columns = weight.detach().index_select(1, indices).cpu()
        coded = CodedColumns.of(checkpoint, name, columns, indices, config)
        yield _Trained(delta, coded, columns, scaling, delta.detach().clone())
