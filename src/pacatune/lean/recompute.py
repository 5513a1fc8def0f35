"""Runs the first part of a module again in the backward pass instead of keeping what it computes.

A module's forward has a cut. What comes before it (gate and up, or query, key and value, from the
module's input) is computed again, up to the cut and no further; what comes after it (down_proj,
attention) is not. Checkpointing by torch has no such end: whatever saves last is run again as well.

    forward   the module runs as always, and its graph is recorded inside a Function
    saved     before the cut nothing; after it no tensor from before it: the graph holds numbers
    backward  the module runs again up to the cut, with a graph that is thrown away; what this one
              saves, in its order, is what the numbers stand for

What must be kept all the same goes through `ctx.save_for_backward`, so that hooks of others
(checkpointing, offloading, our byte counts) see it: saved-tensor hooks of our own around the module
would replace theirs. The module's input is not kept if it comes from a lean norm, whose own input
is kept in any case. The gradients are those of the recorded graph, bit for bit.
"""

import weakref
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge, saved_tensors_hooks
from torch.nn.modules.dropout import _DropoutNd
from torch.utils._python_dispatch import TorchDispatchMode

from pacatune.lean.fused import refuse_second_derivative
from pacatune.lean.norm import plain_norm, source_of

__all__ = ["NO_CUT", "Cut", "State", "recompute", "state_of", "why_not"]


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


class _Reached(Exception):
    """The cut, when the first part runs again."""

    def __init__(self, tensors: tuple[Tensor, ...]) -> None:
        self.tensors = tensors


class _End(Cut):
    """A cut at which a module stops."""

    def __call__(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        raise _Reached(tensors)


class State(NamedTuple):
    """What decides what a module computes, as far as it may change between two passes."""

    trained: tuple[nn.Parameter, ...]
    versions: tuple[tuple["weakref.ref[Tensor]", tuple[int, int]], ...]
    """All parameters, held weakly, since a weight that somebody holds is written no more."""
    adapters: tuple[Any, ...]
    """Which adapters are on, active and merged, and their factors, for each of PEFT's layers."""


def state_of(module: nn.Module) -> State | None:
    """Return the state of a module; None if it cannot be run again, see `why_not`."""
    parts = list(module.modules())
    if _reason(module, parts) is not None:
        return None
    # Past the guard of adapted layers, which puts pretrained columns back for whoever looks.
    found = (p for part in parts for p in dict.values(part.__dict__["_parameters"]))
    parameters = [p for p in found if p is not None]
    if any(p._backward_hooks for p in parameters):
        return None  # they would see the gradient twice
    trained = {id(p): p for p in parameters if p.requires_grad}
    versions = tuple([(weakref.ref(p), _version_of(p)) for p in parameters])
    return State(tuple(trained.values()), versions, _adapters(parts))


def _version_of(parameter: Tensor) -> tuple[int, int]:
    # Fused optimisers count no versions; what PaCA trains counts their steps.
    return parameter._version, getattr(parameter, "num_steps", 0)


def _adapters(parts: Iterable[nn.Module]) -> tuple[Any, ...]:
    found = []
    for part in parts:
        values = part.__dict__
        if "_disable_adapters" in values:
            active, scaling = values["_active_adapter"], values.get("scaling", {})
            names = (active,) if isinstance(active, str) else tuple(active)
            merged = tuple(values["merged_adapters"])
            found.append((values["_disable_adapters"], names, merged, {**scaling}))
    return tuple(found)


def why_not(module: nn.Module) -> str | None:
    """Say why the parts of a module cannot be run twice; None if they can."""
    return _reason(module, module.modules())


def _reason(module: nn.Module, parts: Iterable[nn.Module]) -> str | None:
    for part in parts:
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


@dataclass
class _Call:
    """One call of a module: how to make it again.

    Attributes:
        body: Takes the inputs and `cut`; returns a tensor.
        num_inputs: How many inputs it has.
        state: Of the module that it runs; None for a function.
        module: The module.
    """

    body: Callable[..., Tensor]
    num_inputs: int
    state: State | None = None
    module: nn.Module | None = None

    def check(self) -> None:
        """Refuse to run again what would be another function by now."""
        if self.state is None or self.module is None:
            return
        for link, version in self.state.versions:
            parameter = link()
            if parameter is None or _version_of(parameter) != version:
                raise RuntimeError(
                    "Backward through a lean module of level 2 or 3 of which a parameter was "
                    "changed or replaced since its forward pass: it is computed again now. Run "
                    "the forward pass again, or use level 1."
                )
        if _adapters(self.module.modules()) != self.state.adapters:
            raise RuntimeError(
                "Backward through a lean module of level 2 or 3 whose adapters were switched, "
                "merged or scaled since its forward pass: it is computed again now. Undo that "
                "before the backward pass, or use level 1."
            )


def recompute(
    body: Callable[..., Tensor],
    inputs: Sequence[Tensor],
    module: nn.Module | None = None,
    state: State | None = None,
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
        module: What `body` runs, if it has parameters.
        state: `state_of(module)`, taken now.

    Returns:
        What `body` returns.

    Raises:
        RuntimeError: In the backward pass, if the module has changed since.
    """
    trained = () if state is None else state.trained
    call = _Call(body, len(inputs), state, module)
    return _Recomputed.apply(call, *inputs, *trained)


class _Recomputed(torch.autograd.Function):
    """See `recompute`."""

    @staticmethod
    def forward(ctx: Any, call: _Call, *tensors: Tensor) -> Tensor:
        inputs, trained = tensors[: call.num_inputs], tensors[call.num_inputs :]
        needed = ctx.needs_input_grad[1:]
        if not any(needed):
            return call.body(*inputs, cut=NO_CUT)
        kept = _Kept(inputs)
        with torch.enable_grad():
            sources = [
                _source(x) if is_needed else x.detach()
                for x, is_needed in zip(inputs, needed, strict=False)
            ]
            with saved_tensors_hooks(kept.pack, kept.unpack):
                y = call.body(*sources, cut=kept)
            # A view's node owns what leads to it; in torch 2.6 the edge of a Function does not.
            end = y.view_as(y)
        ctx.call, ctx.kept, ctx.autocast = call, kept, _autocast_of(inputs[0])
        origins = [x for x in (*sources, *trained) if x.requires_grad]
        ctx.edges = [get_gradient_edge(x) for x in origins]
        ctx.edge = get_gradient_edge(end) if end.requires_grad else None
        found = [source_of(x) for x in inputs]
        ctx.norms = [None if source is None else source.norm for source in found]
        saved: list[Tensor | None] = []
        for x, source in zip(inputs, found, strict=True):
            saved += [x] if source is None else [source.x, source.weight, source.bias]
        ctx.save_for_backward(*saved, *kept.forget())
        return y.detach()

    @staticmethod
    def backward(ctx: Any, gy: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative("A lean module")
        call, kept, needed = ctx.call, ctx.kept, ctx.needs_input_grad[1:]
        if ctx.edge is None:
            return (None,) * (1 + len(needed))
        call.check()
        saved = list(ctx.saved_tensors)
        inputs = []
        for norm in ctx.norms:
            x = saved.pop(0)
            if norm is not None:
                x = plain_norm(x, saved.pop(0), saved.pop(0), norm)
            inputs.append(x)
        try:
            with ctx.autocast():
                kept.remember(call.body, inputs, needed, saved)
            gradients = iter(
                torch.autograd.grad(ctx.edge, ctx.edges, gy, retain_graph=True, allow_unused=True)
            )
        finally:
            kept.forget()
        return (None, *(next(gradients) if is_needed else None for is_needed in needed))


def _autocast_of(x: Tensor) -> Callable[[], AbstractContextManager[Any]]:
    """Return what brings back the autocast of now."""
    device_type = x.device.type
    if not torch.amp.is_autocast_available(device_type):  # the meta device
        return nullcontext
    enabled = torch.is_autocast_enabled(device_type)
    dtype = torch.get_autocast_dtype(device_type)
    return lambda: torch.autocast(device_type, dtype, enabled=enabled, cache_enabled=False)


class _Source(torch.autograd.Function):
    """Makes a tensor a beginning of a graph without the graph holding it, as a leaf would be."""

    @staticmethod
    def forward(ctx: Any, token: Tensor, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None]:
        raise AssertionError("gradients are taken before they come here")


def _source(x: Tensor) -> Tensor:
    token = torch.empty(0, device=x.device, requires_grad=True)
    return _Source.apply(token, x)


class _Kept(Cut):
    """Turns what a graph keeps into tokens, and tokens into what it had.

    A token says where a tensor is found: the how many-eth saved before the cut; a part of an input
    or of what came to the cut, by its geometry; or the how many-eth of all others.

    Args:
        inputs: What can be had in any case.
    """

    def __init__(self, inputs: Sequence[Tensor]) -> None:
        self._kinds: list[tuple[torch.Size, torch.dtype]] = []  # of what is saved before the cut
        self._before: list[Tensor] = []
        self._known: list[Any] = [x.detach() for x in inputs]
        # How to make those of the known that came neither as inputs nor to the cut.
        self._makers: list[tuple[int | None, Callable[..., Tensor]]] = []
        self._made: tuple[Tensor, ...] = ()
        self._versions: list[int] = []
        self._others: list[Tensor] = []
        self._num_given = 0
        # Inputs that are kept by nothing after the cut need not live beyond it again.
        self._used: set[int] = set()
        self._is_cut = False

    def __call__(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        self._is_cut = True
        self._known += [x.detach() for x in tensors]
        return tensors

    def derive(self, tensor: Tensor, make: Callable[..., Tensor]) -> Tensor:
        self._makers.append((None, make))
        self._known.append(tensor.detach())
        return tensor

    def casts(self) -> AbstractContextManager[Any]:
        return _Casts(self)

    def note_cast(self, x: Tensor, result: Tensor) -> None:
        """Know the result of a cast if it is one of something known."""
        number = self._find(x)
        if number is None or not (x.is_contiguous() and result.is_contiguous()):
            return
        if x.numel() == self._known[number].numel():
            self._used.add(number)
            self._makers.append((number, partial(_cast, dtype=result.dtype)))
            self._known.append(result.detach())

    def _find(self, x: Tensor) -> int | None:
        # Not by its address: tensors without memory (meta, fake) have none.
        storage = x.untyped_storage()._cdata
        for number, known in enumerate(self._known):
            if known.untyped_storage()._cdata == storage:
                return number
        return None

    def pack(self, x: Tensor) -> tuple[Any, ...]:
        """Return what stands for a tensor that the graph keeps."""
        if not self._is_cut:
            self._kinds.append((x.shape, x.dtype))
            return "before", len(self._kinds) - 1
        number = self._find(x)
        if number is not None:
            self._used.add(number)
            offset = x.storage_offset() - self._known[number].storage_offset()
            return "known", number, x.size(), x.stride(), offset
        self._others.append(x.detach())
        return "other", len(self._others) - 1

    def unpack(self, token: tuple[Any, ...]) -> Tensor:
        """Return the tensor again."""
        kind, number, *geometry = token
        if kind == "before":
            return self._before[number]
        if kind == "other":
            return self._others[number]
        # Who overwrites what came to the cut is the last to need it.
        assert self._versions == [x._version for x in self._made]
        size, stride, offset = geometry
        known = self._make(number)
        return known.as_strided(size, stride, known.storage_offset() + offset)

    def _make(self, number: int) -> Tensor:
        """Return a known tensor, made now if that was not asked for before."""
        if self._known[number] is None:
            origin, make = self._makers[number - self._num_given]
            with torch.no_grad():
                values = self._made if origin is None else (self._make(origin),)
                self._known[number] = make(*values)
        return cast(Tensor, self._known[number])

    def remember(
        self,
        body: Callable[..., Tensor],
        inputs: list[Tensor],
        needed: Sequence[bool],
        others: list[Tensor],
    ) -> None:
        """Run the first part again and have at hand what `unpack` returns.

        Raises:
            RuntimeError: If it does something else than in the forward pass.
        """
        before: list[Tensor] = []
        made: tuple[Tensor, ...] = ()

        def pack(x: Tensor) -> None:
            before.append(x.detach())

        leaves = [
            x.detach().requires_grad_(is_needed)
            for x, is_needed in zip(inputs, needed, strict=False)
        ]
        with torch.enable_grad(), saved_tensors_hooks(pack, _refuse):
            try:
                body(*leaves, cut=_End())
            except _Reached as end:
                made = tuple(x.detach() for x in end.tensors)
        if [(x.shape, x.dtype) for x in before] != self._kinds or bool(made) != self._is_cut:
            raise RuntimeError(
                "Backward through a lean module of level 2 or 3 that computes something else than "
                "in its forward pass, or was made plain since. Run the forward pass again, or use "
                "level 1."
            )
        self._before, self._made, self._others = before, made, others
        given = [*(x.detach() for x in inputs), *made]
        known = [x if n in self._used else None for n, x in enumerate(given)]
        self._known, self._num_given = [*known, *(None for _ in self._makers)], len(given)
        self._versions = [x._version for x in made]
        inputs.clear()

    def forget(self) -> list[Tensor]:
        """Hold nothing from now on; return what is to be kept beside the inputs."""
        others = self._others
        self._before, self._made, self._known, self._others = [], (), [], []
        return others


class _Casts(TorchDispatchMode):
    """Tells what is cast to another dtype."""

    def __init__(self, kept: _Kept) -> None:
        super().__init__()
        self._kept = kept

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        if function is torch.ops.aten._to_copy.default:
            self._kept.note_cast(args[0], result)
        return result


def _cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.to(dtype, memory_format=torch.contiguous_format)


def _refuse(kept: None) -> Tensor:
    raise AssertionError("this graph is never differentiated")
