"""Runs the first part of a module again in the backward pass instead of keeping what it computes.

A module's forward has a cut. What comes before it (gate and up, or query, key and value, from the
module's input) is computed again, up to the cut and no further; what comes after it (down_proj,
attention) is not. The promise:

    forward    the module runs as always, and its graph is recorded inside a Function
    saved      the inputs, or, where a lean norm made them, its input, which is kept in any case;
               and what is saved after the cut, unless it can be had from what came to the cut
    backward   the module runs again up to the cut; what this run saves, in its order, is what the
               recorded graph has saved before the cut
    gradients  are those of the recorded graph, bit for bit
    hooks      on saved tensors (checkpointing, offloading, our byte counts) see all that is kept
    refused    a backward pass by whose time the module is another function

torch's checkpointing has no end in the middle: whatever saves last is run again as well. And
saved-tensor hooks of our own around the module would replace those of others; so they are inside a
Function, which hands on what must be kept by `ctx.save_for_backward`. The graph holds no tensor.
"""

import weakref
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from functools import partial
from operator import methodcaller
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge, saved_tensors_hooks
from torch.nn.modules.dropout import _DropoutNd
from torch.utils._python_dispatch import TorchDispatchMode

from pacatune.lean.norm import plain_norm, source_of
from pacatune.ops.tracing import NOT_LEAN, refuse_second_derivative


class Cut:
    """Where a module's first part ends; this one changes nothing."""

    def __call__(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Return what the first part has made, for the second to go on with."""
        return tensors

    def derive(self, tensor: Tensor, make: Callable[..., Tensor]) -> Tensor:
        """Return a tensor after the cut that `make` makes of what the cut was called with."""
        return tensor

    def casts(self) -> AbstractContextManager[Any]:
        """Return a context in which casts of what can be made again can be made again, too.

        Adapters in another dtype than the weights cast the input of each layer, and keep that.
        """
        return nullcontext()


NO_CUT = Cut()


class State(NamedTuple):
    """What decides what a module computes, as far as it may change between two passes."""

    module: nn.Module
    trained: tuple[nn.Parameter, ...]
    versions: tuple[tuple["weakref.ref[Tensor]", int, int], ...]
    """All parameters, held weakly, since a weight that somebody holds is written no more.

    Their versions, and their steps: fused optimisers count no versions, what PaCA trains does.
    """
    adapters: tuple[Any, ...]
    """Which adapters are on, active and merged, and their factors, for each of PEFT's layers."""

    def check(self) -> None:
        """Refuse to run again what would be another function by now."""
        for link, version, num_steps in self.versions:
            parameter = link()
            is_same = parameter is not None and parameter._version == version
            if not (is_same and getattr(parameter, "num_steps", 0) == num_steps):
                _refuse("of which a parameter was changed or replaced since its forward pass")
        if _adapters(_parts_of(self.module)) != self.adapters:
            _refuse("whose adapters were switched, merged or scaled since its forward pass")


def _refuse(what: str) -> NoReturn:
    raise RuntimeError(
        f"Backward through a lean module of level 2 or 3 {what}: it is computed again now. Undo "
        "that, run the forward pass again, or use level 1."
    )


def state_of(module: nn.Module) -> State | None:
    """Return the state of a module; None if it cannot be run again, see `why_not`."""
    parts, versions, trained = _parts_of(module), [], {}
    if why_not(module, parts) is not None:
        return None
    for part in parts:
        # Past the guard of adapted layers, which puts pretrained columns back for whoever looks.
        for p in dict.values(part.__dict__["_parameters"]):
            if p is None:
                continue
            if p._backward_hooks:
                return None  # they would see the gradient twice
            versions.append((weakref.ref(p), p._version, getattr(p, "num_steps", 0)))
            if p.requires_grad:
                trained[id(p)] = p
    return State(module, tuple(trained.values()), tuple(versions), _adapters(parts))


def _parts_of(module: nn.Module) -> list[nn.Module]:
    """Return what `modules()` does, which runs three functions for each; in another order."""
    parts: list[nn.Module] = []
    waiting: list[nn.Module | None] = [module]
    while waiting:
        if (part := waiting.pop()) is not None:
            parts.append(part)
            waiting += part._modules.values()
    return parts


def _adapters(parts: list[nn.Module]) -> tuple[Any, ...]:
    found = []
    for part in parts:
        values = part.__dict__
        if "_disable_adapters" in values:
            active, scaling = values["_active_adapter"], values.get("scaling", {})
            names = (active,) if isinstance(active, str) else tuple(active)
            merged = tuple(values["merged_adapters"])
            found.append((values["_disable_adapters"], names, merged, {**scaling}))
    return tuple(found)


def why_not(module: nn.Module, parts: list[nn.Module] | None = None) -> str | None:
    """Say why a module, and its parts, cannot be run twice; None if they can."""
    for part in parts or _parts_of(module):
        values = part.__dict__
        if isinstance(part, _DropoutNd) and part.p > 0:
            return f"dropout ({part.p}) cannot be computed again"
        if "weight" in values or "bias" in values:
            return "tensors stand where its parameters were (FSDP1, nn.DataParallel)"
        if part is not module and (
            "forward" in values
            or values["_forward_hooks"]
            or values["_forward_pre_hooks"]
            or values["_backward_hooks"]
            or values["_backward_pre_hooks"]
        ):
            return "hooks on its layers, or replaced forwards, would run twice"
    return None


def recompute(
    body: Callable[..., Tensor], inputs: Sequence[Tensor], state: State | None = None
) -> Tensor:
    """Apply `body`, and in the backward pass again as far as its cut.

    Forward   y = body(*inputs, cut=cut)
    Backward  that of `body`, bit for bit; what it saves before the cut is made again
    Saves the inputs, or what a lean norm made them of, and what `body` saves after the cut, unless
    it shares memory with an input or with what came to the cut.

    Args:
        body: Calls cut(*tensors) once, and goes on with what that returns. Must do the same
            again, and use no gradients but those of `inputs` and of the module's parameters.
        inputs: Tensors of any shape.
        state: `state_of` the module that `body` runs, if there is one, taken now.

    Returns:
        What `body` returns.

    Raises:
        RuntimeError: In the backward pass, if the module has changed since.
    """
    trained = () if state is None else state.trained
    return _Recomputed.apply(body, state, len(inputs), *inputs, *trained)


class _Recomputed(torch.autograd.Function):
    """See `recompute`."""

    @staticmethod
    def forward(
        ctx: Any, body: Callable[..., Tensor], state: State | None, num: int, *tensors: Tensor
    ) -> Tensor:
        inputs, trained, needed = tensors[:num], tensors[num:], ctx.needs_input_grad[3:]
        if not any(needed):
            return body(*inputs, cut=NO_CUT)
        kept = _Kept(inputs)
        with torch.enable_grad():
            starts = [
                _start(x) if is_needed else x.detach()
                for x, is_needed in zip(inputs, needed, strict=False)
            ]
            with saved_tensors_hooks(kept.pack, _call):
                y = body(*starts, cut=kept)
            if not y.requires_grad:
                ctx.mark_non_differentiable(y)
                return y
            # A view's node owns what leads to it; in torch 2.6 the edge of a Function does not.
            ctx.edge = get_gradient_edge(y.view_as(y))
        ctx.edges = [get_gradient_edge(x) for x in (*starts, *trained) if x.requires_grad]
        ctx.call = body, state, kept, _autocast_of(inputs[0])
        ctx.norms, saved = [], list[Tensor | None]()
        for x in inputs:
            *made_of, norm = source_of(x) or (x, None)
            ctx.norms.append(norm)
            saved += made_of
        ctx.save_for_backward(*saved, *kept.forget())
        return y.detach()

    @staticmethod
    def backward(ctx: Any, gy: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative("A lean module", NOT_LEAN)
        (body, state, kept, autocast), needed = ctx.call, ctx.needs_input_grad[3:]
        if state is not None:
            state.check()
        saved = list(ctx.saved_tensors)
        take = partial(saved.pop, 0)
        inputs = [
            take() if norm is None else plain_norm(take(), take(), take(), norm)
            for norm in ctx.norms
        ]
        try:
            with autocast():
                kept.remember(body, inputs, needed, saved)
            gradients = iter(
                torch.autograd.grad(ctx.edge, ctx.edges, gy, retain_graph=True, allow_unused=True)
            )
        finally:
            kept.forget()
        return None, None, None, *(next(gradients) if is_needed else None for is_needed in needed)


def _autocast_of(x: Tensor) -> Callable[[], AbstractContextManager[Any]]:
    """Return what brings back the autocast of now."""
    device_type = x.device.type
    if not torch.amp.is_autocast_available(device_type):  # the meta device
        return nullcontext
    enabled = torch.is_autocast_enabled(device_type)
    dtype = torch.get_autocast_dtype(device_type)
    return partial(torch.autocast, device_type, dtype, enabled=enabled, cache_enabled=False)


class _Start(torch.autograd.Function):
    """Makes a tensor a beginning of a graph without the graph holding it, as a leaf would be."""

    @staticmethod
    def forward(ctx: Any, token: Tensor, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None]:
        raise AssertionError("gradients are taken before they come here")


def _start(x: Tensor) -> Tensor:
    return _Start.apply(torch.empty(0, device=x.device, requires_grad=True), x)


class _Kept(Cut):
    """What the recorded graph keeps: a function for each tensor, which gives it when it is back.

    That is the how many-eth saved before the cut; a part, by its geometry, of what is known (an
    input, what came to the cut, what is made of it); or the how many-eth of all others.

    Args:
        inputs: What can be had in any case.
    """

    def __init__(self, inputs: Sequence[Tensor]) -> None:
        self._kinds: list[tuple[torch.Size, torch.dtype]] = []  # of what is saved before the cut
        self._before: list[Tensor] = []
        self._others: list[Tensor] = []
        self._known: list[Any] = [x.detach() for x in inputs]
        # Number of a known -> how to make it, of which others; inputs and the cut's are there.
        self._makers: dict[int, tuple[Sequence[int], Callable[..., Tensor]]] = {}
        self._of_cut: range | None = None
        # An input that nothing after the cut keeps need not live beyond it again.
        self._used: set[int] = set()

    def __call__(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        self._of_cut = range(len(self._known), len(self._known) + len(tensors))
        self._known += [x.detach() for x in tensors]
        return tensors

    def derive(self, tensor: Tensor, make: Callable[..., Tensor]) -> Tensor:
        assert self._of_cut is not None
        self._note(tensor, make, self._of_cut)
        return tensor

    def casts(self) -> AbstractContextManager[Any]:
        return _Casts(self.note_cast)

    def note_cast(self, x: Tensor, result: Tensor) -> None:
        """Know the result of a cast if it is one of something known."""
        number = self._find(x)
        if number is None or not (x.is_contiguous() and result.is_contiguous()):
            return
        if x.numel() == self._known[number].numel() and self._known[number].is_contiguous():
            self._note(result, methodcaller("to", result.dtype), [number])

    def _note(self, tensor: Tensor, make: Callable[..., Tensor], origins: Sequence[int]) -> None:
        self._used.update(origins)
        self._makers[len(self._known)] = origins, make
        self._known.append(tensor.detach())

    def _find(self, x: Tensor) -> int | None:
        # Not by its address: tensors without memory (meta, fake) have none.
        storage = x.untyped_storage()._cdata
        for number, known in enumerate(self._known):
            if known.untyped_storage()._cdata == storage:
                return number
        return None

    def pack(self, x: Tensor) -> Callable[[], Tensor]:
        """Return what gives a tensor that the graph keeps."""
        if self._of_cut is None:
            self._kinds.append((x.shape, x.dtype))
            return partial(self._before.__getitem__, len(self._kinds) - 1)
        number = self._find(x)
        if number is None:
            self._others.append(x.detach())
            return partial(self._others.__getitem__, len(self._others) - 1)
        self._used.add(number)
        offset = x.storage_offset() - self._known[number].storage_offset()
        return partial(self._part, number, x.size(), x.stride(), offset)

    def _part(self, number: int, size: torch.Size, stride: tuple[int, ...], offset: int) -> Tensor:
        known = self._make(number)
        return known.as_strided(size, stride, known.storage_offset() + offset)

    def _make(self, number: int) -> Tensor:
        if self._known[number] is None:
            origins, make = self._makers[number]
            with torch.no_grad():
                self._known[number] = make(*map(self._make, origins))
        known: Tensor = self._known[number]
        return known

    def remember(
        self,
        body: Callable[..., Tensor],
        inputs: list[Tensor],
        needed: Sequence[bool],
        others: list[Tensor],
    ) -> None:
        """Run the first part again and have everything back.

        Raises:
            RuntimeError: If it does something else than in the forward pass.
        """
        leaves = [
            x.detach().requires_grad_(is_needed)
            for x, is_needed in zip(inputs, needed, strict=False)
        ]
        end = _End()
        hooks = saved_tensors_hooks(lambda x: self._before.append(x.detach()), _call)
        with torch.enable_grad(), hooks, suppress(_Reached):
            body(*leaves, cut=end)
        made = [x.detach() for x in end.tensors]
        kinds = [(x.shape, x.dtype) for x in self._before]
        if kinds != self._kinds or bool(made) != bool(self._of_cut):
            what = "that computes something else than in its forward pass, or was made plain since"
            _refuse(what)
        given = [*(x.detach() for x in inputs), *made]
        self._known += [x if number in self._used else None for number, x in enumerate(given)]
        self._known += [None] * len(self._makers)
        self._others += others
        inputs.clear()

    def forget(self) -> list[Tensor]:
        """Hold nothing from now on; return what is to be kept beside the inputs."""
        others = [*self._others]
        for held in (self._before, self._known, self._others):
            held.clear()
        return others


def _call(token: Callable[[], Tensor]) -> Tensor:
    return token()


class _End(Cut):
    """A cut at which a module stops, when its first part runs again."""

    tensors: tuple[Tensor, ...] = ()

    def __call__(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        self.tensors = tensors
        raise _Reached


class _Reached(Exception):
    """The cut has been reached."""


class _Casts(TorchDispatchMode):
    """Tells what is cast to another dtype."""

    def __init__(self, note: Callable[[Tensor, Tensor], None]) -> None:
        super().__init__()
        self._note = note

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        if function is torch.ops.aten._to_copy.default:
            self._note(args[0], result)
        return result
