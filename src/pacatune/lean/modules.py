"""What lean modules do in place of their own forward; each goes back to it where it must.

That is: without gradients, in graphs of torch.compile (which decide themselves what to keep) and
under transforms of torch.func.
"""

import functools
import inspect
from collections.abc import Iterable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from pacatune.lean.gated import Activation, apply_gated_product, overwriting
from pacatune.lean.labels import is_away, with_copy
from pacatune.lean.loss import LazyLogits
from pacatune.lean.norm import Norm, apply_norm
from pacatune.lean.recompute import NO_CUT, Cut, recompute, state_of
from pacatune.ops.tracing import is_traced

# Puts a class of ours in place of a module's class, and takes it away again.
#
# A module becomes lean by its class alone: nothing is added to it, its name, its children, its
# state and its signature stay what they were, `super()` is the way it was before, and taking it off
# is one assignment. A forward of the instance (`module.forward = ...`) would be copied with the
# module and then run on the original; a class is not. Copies and pickles are plain modules again.


class LeanModule(nn.Module):
    """What every class of ours has in front of the one that it replaces."""

    plain_class: type[nn.Module]
    """The class that the module had."""
    settings: Any = None
    """What the module was found to be."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        reduced: Any = super().__reduce_ex__(protocol)
        return (_new, (_plain(type(self)),), *reduced[2:])


def _new(kind: type[nn.Module]) -> nn.Module:
    return kind.__new__(kind)


def make_lean(module: nn.Module, kind: type[LeanModule], settings: Any = None) -> None:
    """Give a module the forward of `kind`.

    Args:
        module: Has a class of its own; changed in place.
        kind: Class whose methods come before the module's own.
        settings: Hashable; what `kind` knows about the module.
    """
    of_same: Any = _lean_class
    module.__class__ = of_same(type(module), kind, settings)


def make_plain(module: nn.Module) -> None:
    """Undo `make_lean`, where there is anything to undo."""
    if kind_of(module) is not None:
        module.__class__ = _plain(type(module))


def kind_of(module: nn.Module) -> type[nn.Module] | None:
    """Return the class of ours that a module has, or that its own was derived from since (FSDP2).

    None if it is not lean.
    """
    return next((kind.__bases__[0] for kind in type(module).__mro__ if _is_lean_class(kind)), None)


@functools.cache
def _lean_class(plain: type[nn.Module], kind: type[LeanModule], settings: Any) -> type[nn.Module]:
    body: dict[str, Any] = {"plain_class": plain, "settings": settings}
    for name in ("__module__", "__qualname__", "__doc__"):
        body[name] = getattr(plain, name)
    if "forward" in vars(kind):
        own = vars(kind)["forward"]

        @functools.wraps(plain.forward)  # trainers read the names of a model's arguments
        def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
            return own(self, *args, **kwargs)

        forward.__signature__ = inspect.signature(plain.forward)  # type: ignore[attr-defined]
        body["forward"] = forward
    return type(plain.__name__, (kind, plain), body)


def _is_lean_class(kind: Any) -> bool:
    return isinstance(kind, type) and "plain_class" in vars(kind)


def _plain(kind: type) -> type:
    """Return a class without ours among its ancestors."""
    if _is_lean_class(kind):
        return _plain(vars(kind)["plain_class"])
    if not any(_is_lean_class(ancestor) for ancestor in kind.__mro__):
        return kind
    body = {n: v for n, v in vars(kind).items() if n not in ("__dict__", "__weakref__")}
    return type(kind.__name__, tuple(_plain(base) for base in kind.__bases__), body)


@dataclass(frozen=True)
class GatedNames:
    """What a gated MLP calls its parts.

    Attributes:
        gate: Projection to the gate; with `is_fused`, to both halves.
        up: The other projection.
        down: Projection of the product.
        activation: Activation function of the gate.
        is_fused: Whether one layer computes gate and up.
        gate_first: Which half is the gate.
    """

    gate: str
    up: str
    down: str
    activation: Activation
    is_fused: bool = False
    gate_first: bool = True


class LeanGatedMLP(LeanModule):
    """down(act(gate(x)) * up(x)), keeping gate and up."""

    settings: GatedNames

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Apply the MLP to (..., H)."""
        if args or kwargs or not torch.is_grad_enabled() or is_traced():
            return super().forward(x, *args, **kwargs)
        return apply_gated(self._modules, self.settings, x, NO_CUT)


def apply_gated(parts: dict[str, Any], names: GatedNames, x: Tensor, cut: Cut) -> Any:
    """Apply a gated MLP; the cut is behind the projections of its input."""
    made = cut(*(parts[name](x) for name in dict.fromkeys((names.gate, names.up))))
    gate, up = _gate_and_up(names, *made)
    activation, down = names.activation, parts[names.down]
    if not (gate.requires_grad or up.requires_grad):
        return down(activation.value(gate) * up)
    # A layer that needs only some columns of the product can do without the product.
    together = getattr(down, "forward_of_product", None)
    y = None if together is None else together(gate, up, activation)
    if y is not None:
        return y
    h = apply_gated_product(gate, up, activation)
    h = cut.derive(h, lambda *made: activation.product(*_gate_and_up(names, *made)))
    with cut.casts():
        return down(h)


def _gate_and_up(names: GatedNames, *made: Tensor) -> Sequence[Tensor]:
    if not names.is_fused:
        return made
    halves = made[0].chunk(2, dim=-1)
    return halves if names.gate_first else halves[::-1]


class RecomputedGatedMLP(LeanGatedMLP):
    """down(act(gate(x)) * up(x)), keeping x, or the input of the norm that made it."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Apply the MLP to (..., H)."""
        state = None
        if not (args or kwargs or not torch.is_grad_enabled() or is_traced()):
            state = state_of(self)
        if state is None or not (x.requires_grad or state.trained):
            return super().forward(x, *args, **kwargs)
        names = replace(self.settings, activation=overwriting(self.settings.activation))
        return recompute(partial(apply_gated, self._modules, names), [x], state)


class LeanNorm(LeanModule):
    """RMSNorm or LayerNorm, keeping its input as it came."""

    settings: Norm

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Normalise (..., I)."""
        weight = self._parameters.get("weight")
        if (
            args
            or kwargs
            or not torch.is_grad_enabled()
            or is_traced()
            or x.itemsize > 4
            or (weight is not None and weight.dtype != x.dtype and not self.settings.mixes)
        ):
            return super().forward(x, *args, **kwargs)
        return apply_norm(x, weight, self._parameters.get("bias"), self.settings)


class LeanAttention(LeanModule):
    """Marks an attention whose calls of the attention function keep no repeated heads."""


_cut: ContextVar[tuple[nn.Module, Cut] | None] = ContextVar("cut", default=None)


def cut_of(module: nn.Module) -> Cut:
    """Return where the attention that is running now is cut."""
    found = _cut.get()
    return NO_CUT if found is None or found[0] is not module else found[1]


class RecomputedAttention(LeanAttention):
    """An attention that keeps its input, or that of the norm that made it, for query, key, value.

    The cut is where it calls the attention function.
    """

    settings: str
    """Name of the argument that it projects."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the attention as it is."""
        rest = dict(kwargs)
        x, *more = args or (rest.pop(self.settings, None),)
        state = None
        if torch.is_grad_enabled() and not is_traced() and _are_fixed(more, rest.values()):
            state = state_of(self)
        if state is None or not isinstance(x, Tensor) or not (x.requires_grad or state.trained):
            return super().forward(*args, **kwargs)
        run, others = super().forward, list[Any]()

        def body(x: Tensor, cut: Cut) -> Tensor:
            token = _cut.set((self, cut))
            try:
                y, *others[:] = run(x, *more, **rest)
            finally:
                _cut.reset(token)
            assert not any(isinstance(other, Tensor) for other in others)
            return y

        y = recompute(body, [x], state)
        return (y, *others)


def _are_fixed(*groups: Iterable[Any]) -> bool:
    """Whether arguments are the same in a second call: no caches, and nothing that is trained."""
    return all(
        value is None
        or isinstance(value, int | float | str)
        or (isinstance(value, Tensor) and not value.requires_grad)
        or (isinstance(value, tuple | list) and _are_fixed(value))
        for group in groups
        for value in group
    )


_wants_loss: ContextVar[bool] = ContextVar("wants_loss", default=False)


class LeanModel(LeanModule):
    """A model whose loss is computed from its head's `LazyLogits`."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model; tell its head if there are labels, which the host reads meanwhile."""
        labels = kwargs.get("labels")
        if is_traced() or labels is None or not self.training or _has_own_loss(self):
            return super().forward(*args, **kwargs)
        if type(labels) is Tensor and is_away(labels):
            kwargs["labels"] = with_copy(labels)
        token = _wants_loss.set(True)
        try:
            return super().forward(*args, **kwargs)
        finally:
            _wants_loss.reset(token)


def _has_own_loss(model: nn.Module) -> bool:
    """Whether somebody gave the model a loss function, which may want a tensor."""
    function = vars(model).get("_loss_function")
    return function is not None and not str(function.__module__).startswith("transformers.")


class LeanHead(LeanModule):
    """An nn.Linear that leaves its product to the loss, where the model computes one."""

    weight: Tensor

    def forward(self, x: Tensor) -> Any:
        """Return logits (..., V), or what stands for them."""
        # Of one in blocks, these: its weight is decoded whenever somebody asks for it.
        weight = getattr(self, "blocks", None)
        weight = self.weight if weight is None else weight
        if (
            is_traced()
            or not _wants_loss.get()
            or not torch.is_grad_enabled()
            or not (x.requires_grad or weight.requires_grad)
            or x.dim() < 2
            # The weight may be there during the call only: sharded, offloaded.
            or self._forward_hooks
            or self._forward_pre_hooks
            or type(weight) not in (nn.Parameter, Tensor)
        ):
            return super().forward(x)
        return LazyLogits(x, cast(Any, self))
