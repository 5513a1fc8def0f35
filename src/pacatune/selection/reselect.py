"""Trains a few of an adapter's columns at a time, and others after every so many steps."""

from collections.abc import Iterator
from typing import Any

import torch
from accelerate.utils.deepspeed import DeepSpeedOptimizerWrapper
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers.trainer_callback import TrainerCallback

from pacatune.format.tensors import PEFT_PREFIX
from pacatune.strategies import seed_for
from pacatune.tuner.layer import PacaLayer

__all__ = ["ReselectColumns"]


class ReselectColumns(TrainerCallback):
    """Let only `num_columns` of each layer's r columns move, chosen anew every `every` steps.

    All r columns belong to the adapter: those whose turn is over keep what they have learned, in
    the weight as everywhere else, so that files, merges and resumed runs are as without it. Turns
    follow a random order of each layer's columns, which the seed and the layer's name decide, and
    begin again once each column has had its turn. Layers with no more than `num_columns` columns
    train all of them in every step.

    The optimizer steps all columns, and those that wait are put back, bit for bit. So they have
    their gradients and optimizer states from the start, which r columns cost anyway, and a column
    whose turn begins has no warm-up. The norm that gradients are clipped to is that of all.

    Args:
        num_columns: Columns of a layer that are trained at a time.
        every: Optimizer steps from one choice to the next.
        seed: Chooses the order of the columns.

    Raises:
        ValueError: If a number is not positive. When training begins: if no layer has more than
            `num_columns` columns, if updates are not whole (FSDP1), or under DeepSpeed.
    """

    def __init__(self, num_columns: int, every: int, seed: int = 42) -> None:
        for name, value in (("num_columns", num_columns), ("every", every)):
            if value < 1:
                raise ValueError(f"`{name}` ({value}) must be at least 1.")
        self.num_columns, self.every, self.seed = num_columns, every, seed
        self._waiting: list[tuple[Tensor, int, Tensor, Tensor]] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Refuse what has no turns to take."""
        if isinstance(kwargs.get("optimizer"), DeepSpeedOptimizerWrapper):
            raise ValueError(
                "columns that wait are put back after the optimizer's step, and DeepSpeed steps in "
                "its backward pass, on copies of its own; choose columns anew under DDP or FSDP2."
            )
        found = list(_trained_deltas(kwargs["model"]))
        if all(delta.shape[dim] <= self.num_columns for _, delta, dim in found):
            raise ValueError(
                f"`num_columns` ({self.num_columns}) must be below the `r` of the PaCA adapter "
                f"that is trained, in {len(found)} layers; raise `r`, or train without turns."
            )

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Keep what the columns hold whose turn it is not."""
        turn = state.global_step // self.every
        self._waiting = []
        for name, delta, dim in _trained_deltas(kwargs["model"]):
            if delta.shape[dim] <= self.num_columns:
                continue
            waiting = self.waiting(name, delta.shape[dim], turn).to(delta.device)
            values = _local(delta).detach().index_select(dim, waiting)
            self._waiting.append((delta, dim, waiting, values))

    @torch.no_grad()
    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Put it back."""
        for delta, dim, waiting, values in self._waiting:
            _local(delta).index_copy_(dim, waiting, values)
        self._waiting = []

    def waiting(self, name: str, r: int, turn: int) -> Tensor:
        """Return the places, of a layer's r columns, that are not trained in a turn.

        Args:
            name: The layer's name in the base model.
            r: Number of its columns.
            turn: Number of choices before this one.

        Returns:
            (r - num_columns,) int64, sorted.
        """
        generator = torch.Generator().manual_seed(seed_for(self.seed, name))
        order = torch.randperm(r, generator=generator)
        first = turn * self.num_columns
        places = torch.arange(first + self.num_columns, first + r) % r
        return order[places].sort().values


def _trained_deltas(model: nn.Module) -> Iterator[tuple[str, Tensor, int]]:
    """Return the trained updates: the layer's name, the update and the dimension of its columns."""
    for name, module in model.named_modules():
        if not isinstance(module, PacaLayer):
            continue
        holders: Any = module.paca_delta.values()
        for holder in holders:
            delta = holder.weight
            if not delta.requires_grad:
                continue
            if delta.dim() < 2:
                raise ValueError(
                    f"the update of {name!r} is held in parts of one dimension (FSDP1), which have "
                    "no columns; choose columns anew under DDP or FSDP2."
                )
            yield name.removeprefix(PEFT_PREFIX), delta, module.layout.delta_dim


def _local(delta: Tensor) -> Tensor:
    return delta.to_local() if isinstance(delta, DTensor) else delta
