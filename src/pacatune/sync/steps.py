"""Training on the codes of a file: what the model computes with is what the file can hold.

Beside a sampler that serves codes, the trainer's function is then the sampler's. Rates must be high
enough that codes move: a column is at the nearest ones to what the optimiser has reached.
"""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from pacatune.grid.checkpoint import FileColumns, PackedCheckpoint
from pacatune.ops.columns import adapted_columns
from pacatune.sync.adapted import Adapted, base_of, layers_of

_TRIES = 3


class _Trained(NamedTuple):
    adapted: Adapted
    state: tuple[int, ...]
    """That of `adapted`; after another adapter was loaded, with its columns, it is another one."""
    update: Any
    """What its layer trains."""
    coded: FileColumns
    columns: Tensor
    """(O, R), the base's."""
    rest: Tensor
    """(O, R), by which what the optimiser has reached is more than delta."""


class GridSteps:
    """Keeps a model's trained columns at values of codes, from one optimiser's step to the next.

    What a step adds that codes cannot hold is kept for the next one; gradients are those at the
    codes' values. Checkpoints hold these values and not the rest, so a resumed run begins at them.
    An adapter may be loaded at any time: the next step is one from it. Codes are searched where the
    weights are, for every trained element twice a step.

    Args:
        model: A PEFT model with a PaCA adapter, whose base was dequantised from the checkpoint into
            bfloat16 or float16.
        checkpoint: What `pacatune.patch.packed.open_packed` returns of the base.
        optimizer: What trains the adapter.

    Raises:
        ValueError: If values of codes could not be reached exactly: float32 weights, a factor
            alpha / r that is no power of two; or the base is another one.
    """

    def __init__(
        self, model: Any, checkpoint: PackedCheckpoint, optimizer: torch.optim.Optimizer
    ) -> None:
        self._model, self._checkpoint = model, checkpoint
        self._trained = list(_trained(model, checkpoint))
        optimizer.register_step_post_hook(self._after_step)
        self._after_step()

    @torch.no_grad()
    def _after_step(self, *_: Any) -> None:
        if any(trained.adapted.state != trained.state for trained in self._trained):
            self._trained = list(_trained(self._model, self._checkpoint))
        for trained in self._trained:
            delta = trained.update.delta
            reached = delta + trained.rest
            delta.copy_(_on_codes(trained, reached))
            torch.sub(reached, delta, out=trained.rest)


def _on_codes(trained: _Trained, reached: Tensor) -> Tensor:
    """Return the (O, R) delta by which columns have just the values of their nearest codes."""
    scaling = trained.update.scaling

    def nearest(delta: Tensor) -> Tensor:
        codes = trained.coded.moved(delta, scaling).after
        return trained.coded.values(codes).to(trained.columns.dtype)

    # Values are rounded to 16 bits, codes are counted from the file's: far from there, near to
    # zero, another code may be the nearest each time. Such an element ends at the base's.
    values = nearest(reached)
    for _ in range(_TRIES):
        delta = (values.float() - trained.columns) / scaling
        previous, values = values, nearest(delta)
        if torch.equal(previous, values):
            break
    adapted = adapted_columns(trained.columns, delta, scaling)
    return torch.where((previous == values) & (adapted == values), delta, 0.0)


def _trained(model: Any, checkpoint: PackedCheckpoint) -> Iterator[_Trained]:
    config = cast(Any, base_of(model)).config.get_text_config()
    for adapted in layers_of(model, None):
        update, where = adapted.layer.update_of(adapted.adapter), f"{adapted.parameter!r}"
        weight = cast(Any, adapted.layer).get_base_layer().weight
        if checkpoint.grid(checkpoint.name_of(adapted.parameter, config.num_hidden_layers)) is None:
            continue  # plain numbers, which any step reaches
        if update.mix is not None:
            raise ValueError(
                f"{where} has an update of low rank, which does not reach single codes; on codes, "
                "train without `channels`."
            )
        if weight.itemsize != 2 or update.delta.dtype != torch.float32:
            raise ValueError(
                f"{where} is in {weight.dtype} and its delta in {update.delta.dtype}; on codes, "
                "load the base in bfloat16 and train deltas in float32."
            )
        if not math.log2(update.scaling).is_integer():
            raise ValueError(
                f"{where} has alpha / r = {update.scaling:g}, by which values of codes would be "
                "rounded; give a power of two."
            )
        columns = weight.detach().index_select(1, update.indices)
        coded = FileColumns(checkpoint, adapted.parameter, columns, update.indices, config)
        rest = torch.zeros_like(update.delta, requires_grad=False)
        yield _Trained(adapted, adapted.state, update, coded, columns, rest)
