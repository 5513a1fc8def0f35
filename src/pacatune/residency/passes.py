"""When columns are in a weight: in training passes, and in evaluation that asks for it.

torch calls back before and after each step of an optimiser. Whoever holds a weight by then, such as
an optimiser over all parameters, sees the pretrained columns in it; where nobody does, the columns
stay until the next pass writes newer ones over them.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from pacatune.ops.columns import Update
from pacatune.ops.linear import Call, Elementwise
from pacatune.residency.put import is_aside
from pacatune.residency.reading import Result, in_order, read, read_pretrained
from pacatune.residency.together import Group, restore_all
from pacatune.residency.watching import LOCK, DeltaParameter, WeightParameter
from pacatune.residency.weight import Residency


class Pass(Call):
    """One forward pass of a layer that may train, and how its backward finds the weight again.

    Args:
        residency: The residency of the layer's weight.
        update: What the pass is of.
        writes: Whether this pass trains at all.
        activation: As `Call` takes it.
    """

    __slots__ = ("base", "epoch", "residency", "update", "version", "writes")
    saves_weight = False

    def __init__(
        self,
        residency: Residency,
        update: Update,
        writes: bool = True,
        activation: Elementwise | None = None,
    ) -> None:
        self.scaling, self.activation = update.scaling, activation
        self.residency, self.update, self.writes = residency, update, writes
        mix = update.mix
        self.version = update.delta._version + (0 if mix is None else mix._version)
        self.base, self.epoch = (0, 0), -1

    # Columns are in the weight already, as a rule, and nobody touches it meanwhile: what both
    # passes try first is the shortest way. They call next to nothing, since every layer does.

    def forward(self, compute: Callable[[Tensor, bool], Result]) -> Result | None:
        """Compute with the weight, as `read` does."""
        residency = self.residency
        epoch = self.epoch = residency.epoch
        if residency.holds(self.update):
            weight: Any = residency.weight
            result = (in_order(compute) if is_aside(weight) else compute)(weight, True)
            if residency.epoch == epoch:
                self.base = residency.written_base
                return result
            del weight
        writes = self.writes and self.update.delta.requires_grad
        again = read(residency, compute, self.update, writes=writes)
        self.base = residency.base()
        return again

    def backward(self, compute: Callable[[Tensor, bool], Result]) -> Result:
        """Compute with the weight in the state that the forward pass saw.

        Args:
            compute: As `read` takes it. Where the columns are not in the weight it uses the delta
                that the forward pass has saved, whatever became of it since.

        Raises:
            RuntimeError: If the adapter is merged or the base weight was changed since.
        """
        residency, (delta, _, _, mix) = self.residency, self.update
        if residency.epoch == self.epoch and residency.holds(self.update):
            weight: Any = residency.weight
            result = (in_order(compute) if is_aside(weight) else compute)(weight, True)
            if residency.epoch == self.epoch:
                return result
            del weight
        if residency.is_merged:
            raise RuntimeError(
                "Backward through a forward pass made before the adapter was merged: the weight "
                "has changed since. Call `unmerge_adapter()` first, or run the forward pass again."
            )
        if residency.find_weight() is None or residency.base() != self.base:
            raise RuntimeError(
                "Backward through a forward pass whose base weight was changed, moved, replaced or "
                "made to ask for a gradient since. Run the forward pass again."
            )
        version = delta._version + (0 if mix is None else mix._version)
        if version != self.version:  # saved-tensor hooks have kept what it was
            return read_pretrained(residency, compute)
        writes = self.writes and delta.requires_grad
        again = read(residency, compute, self.update, writes=writes)
        assert again is not None
        return again


@contextmanager
def resident(model: nn.Module) -> Iterator[None]:
    """Let this thread keep the adapted columns in the weights while it evaluates.

    Without it, evaluation never writes: it adds a thin product to each layer's output, and any
    number of threads may share the model. Inside it, this thread's forward passes write the columns
    once and then multiply once, which is faster for generation. Other threads get right results all
    the same; one that is inside it at the same time evaluates as it would without. Parameter
    objects that somebody held before show the adapted columns until it ends.

    Args:
        model: With PaCA layers anywhere in it; other layers are left alone.
    """
    thread = threading.get_ident()
    found = [getattr(module, "residency", None) for module in model.modules()]
    owned: list[Residency] = []
    try:
        with LOCK:
            for residency in found:
                if isinstance(residency, Residency) and residency.owner is None:
                    owned.append(residency)
                    residency.owner = thread
        yield
    finally:
        for residency in owned:
            residency.owner = None
        _restore(owned)


def _restore(residencies: list[Residency]) -> None:
    """Put pretrained columns back by one launch, or tell of what was changed meanwhile."""
    with LOCK:
        restore_all(residencies)
        for residency in residencies:
            residency.restore()


def _watched_of(optimizer: torch.optim.Optimizer) -> Iterator[tuple[Any, Any]]:
    """Yield each delta and weight of an optimiser, and the residency that it belongs to."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if type(parameter) in (DeltaParameter, WeightParameter):
                link = parameter.residency
                yield parameter, None if link is None else link()


def _before_optimizer_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    for parameter, residency in _watched_of(optimizer):
        # It may change the weight as well: one that has a gradient.
        is_changed = type(parameter) is WeightParameter and parameter.grad is not None
        if is_changed and residency is not None:
            residency.look()


def _after_optimizer_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    found = []
    for parameter, residency in _watched_of(optimizer):
        # Fused optimisers count no versions, by which autograd knows what a backward pass cannot
        # use any more.
        if parameter.grad is not None:
            increment_version(parameter)
        if type(parameter) is DeltaParameter:
            parameter.num_steps += 1
            parameter.num_unversioned += 1  # they may have taken the gradient away
            if residency is not None:
                found.append(residency)
    found = list(dict.fromkeys(found))  # two adapters may be trained by turns
    with LOCK:
        _restore([residency for residency in found if residency.is_over()])
        for residency in found:
            residency.is_stale = residency.is_written
    group = Group(found)
    if found and found[0].group != group:
        for residency in found:
            residency.group = group


register_optimizer_step_pre_hook(_before_optimizer_step)
register_optimizer_step_post_hook(_after_optimizer_step)
