"""The adapted linear layer in a graph of torch.compile: an operator that runs as eager mode does.

A graph reads its weights whenever it runs, and only the residency knows whether columns are in one
by then. So the graph does not hold the weight. It calls `pacatune::linear`, and in its backward
`pacatune::linear_grad`, which ask the residency as eager layers do: it writes the columns once per
optimiser step, and where it may not write, adds their product. Neither a step nor a look at the
model changes the graph. What reads activations only, the gather of R channels and the gradient of
delta, are plain operations, which the compiler fuses and schedules as it likes.
"""

import weakref
from typing import Any, cast

import torch
from torch import Tensor
from torch._compile import _disable_dynamo
from torch.nn import functional as F

from pacatune.ops.columns import Update
from pacatune.ops.linear import grad_x, linear_beside
from pacatune.ops.products import NOT_IN_CUDA_GRAPHS, grad_delta, grad_factors
from pacatune.residency import Pass, Residency
from pacatune.residency.reading import read_pretrained

_LAYERS: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()


def handle_of(layer: Any) -> Tensor:
    """Return what graphs call a layer: () int64 on the CPU, as a number would be built into them.

    Args:
        layer: Its `_prepare()` is the active update, its `residency` has the weight.
    """
    _LAYERS[id(layer)] = layer
    with torch.utils._python_dispatch._disable_current_modes():
        return torch.tensor(id(layer), device="cpu")


def compiled_linear(
    x: Tensor,
    update: Update | None,
    bias: Tensor | None,
    handle: Tensor,
    out_features: int,
) -> Tensor:
    """Apply a layer to (..., I) in a graph, with its update or without; returns (..., O)."""
    trains = torch.is_grad_enabled() and update is not None and update.delta.requires_grad
    how = bias, handle, trains, out_features
    y, _ = torch.ops.pacatune.linear(x, *(update or (None, None, 0.0, None)), *how)
    return y


def _open(
    handle: Tensor, delta: Tensor | None, mix: Tensor | None, trains: bool
) -> Pass | Residency | None:
    """Return where the weight of an update is found now; without one, where the pretrained is.

    None if the layer has another one now, or runs in another way.
    """
    layer = _LAYERS[int(handle)]
    if delta is None:
        return cast(Residency, layer.residency)
    update = layer._prepare()
    is_same = update is not None and _is_same(update.delta, delta)
    if update is None or not is_same or not _is_same(update.mix, mix):
        return None
    return Pass(layer.residency, update, trains)


def _is_same(own: Tensor | None, other: Tensor | None) -> bool:
    """Whether a graph has been given a layer's own parameter, or what a hook has wrapped of it."""
    return own is other or (
        own is not None
        and other is not None
        and own.data_ptr() == other.data_ptr()
        and own.shape == other.shape
        and own._version == other._version
    )


def _view(residency: Residency) -> Tensor:
    """Return the weight where it is a view of a larger buffer (FSDP1), which is never written."""
    weight: Any = dict.get(residency.parameters or {}, "weight")
    if weight.requires_grad:
        raise RuntimeError(
            "A compiled graph trains the columns of a weight that asks for a gradient itself. "
            "Freeze it (`base_layer.weight.requires_grad = False`), or do not compile the model."
        )
    return cast(Tensor, weight)


def _linear(
    x: Tensor,
    delta: Tensor | None,
    indices: Tensor | None,
    scaling: float,
    mix: Tensor | None,
    bias: Tensor | None,
    handle: Tensor,
    trains: bool,
    out_features: int,
) -> tuple[Tensor, Tensor]:
    """Return the output, and what tells in the backward pass whether the base is still the same."""

    def compute(weight: Tensor, is_resident: bool) -> Tensor:
        own_bias = None if bias is None else bias.to(x.dtype)
        if delta is not None and indices is not None and not is_resident:
            return linear_beside(x, weight, Update(delta, indices, scaling, mix), own_bias)
        return F.linear(x, weight.to(x.dtype), own_bias)

    opened = _open(handle, delta, mix, trains)
    if opened is None:
        raise RuntimeError(
            "A compiled graph runs an adapted layer whose adapter or hooks have changed since it "
            "was compiled. Call `torch.compiler.reset()` and run it again."
        )
    if isinstance(opened, Residency):
        return read_pretrained(opened, compute), torch.tensor(opened.base(), device="cpu")
    y = opened.forward(compute)
    if y is None:
        y = compute(_view(opened.residency), False)
    return y, torch.tensor(opened.base, device="cpu")


def _linear_grad(
    gy: Tensor,
    delta: Tensor | None,
    indices: Tensor | None,
    scaling: float,
    mix: Tensor | None,
    handle: Tensor,
    base: Tensor,
    in_features: int,
) -> Tensor:
    def compute(weight: Tensor, is_resident: bool) -> Tensor:
        gy_NO = gy.reshape(-1, gy.shape[-1])
        if delta is None or indices is None:
            return gy_NO.mm(weight.to(gy.dtype))
        return grad_x(gy_NO, (delta, indices, scaling, mix), weight, is_resident)

    opened = _open(handle, delta, mix, True)
    if isinstance(opened, Residency):
        gx = read_pretrained(opened, compute)
    else:
        if opened is None:  # hooks on saved tensors have kept what delta was
            assert delta is not None
            assert indices is not None
            opened = Pass(_LAYERS[int(handle)].residency, Update(delta, indices, scaling, mix))
            opened.version = -1
        opened.base = tuple(base.tolist())
        is_view = opened.residency.find_weight() is None and opened.base[1] == 0
        gx = compute(_view(opened.residency), False) if is_view else opened.backward(compute)
    return gx.view(*gy.shape[:-1], in_features)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, delta, indices, scaling, mix, _, handle, *_ = inputs
    x_C = None if delta is None else x.index_select(-1, indices)
    ctx.call = scaling, x.shape[-1]
    ctx.save_for_backward(x_C, delta, indices, mix, handle, output[1])


def _gradients(ctx: Any, gy: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    x_C, delta, indices, mix, handle, base = ctx.saved_tensors
    scaling, in_features = ctx.call
    needs_x, needs_delta, _, _, needs_mix, needs_bias, *_ = ctx.needs_input_grad
    gx = gdelta = gmix = gbias = None
    gy_NO = gy.reshape(-1, gy.shape[-1])
    if needs_x:
        update, where = (delta, indices, scaling, mix), (handle, base, in_features)
        gx = torch.ops.pacatune.linear_grad(gy, *update, *where)
    if needs_delta or needs_mix:
        x_NC = x_C.reshape(gy_NO.shape[0], x_C.shape[-1])
        if mix is None:
            gdelta = grad_delta(gy_NO, x_NC, scaling, delta.dtype)
        else:
            gdelta, gmix = grad_factors(gy_NO, x_NC, delta, mix, scaling)
    if needs_bias:
        gbias = gy_NO.sum(0)
    return gx, gdelta, None, None, gmix, gbias, None, None, None


def _like_y(x: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    y = x.new_empty(*x.shape[:-1], others[-1])
    return y, torch.empty(2, dtype=torch.int64, device="cpu")


def _like_gx(gy: Tensor, *others: Any) -> Tensor:
    return gy.new_empty(*gy.shape[:-1], others[-1])


_library = torch.library.Library("pacatune", "FRAGMENT")
_library.define(
    "linear(Tensor x, Tensor? delta, Tensor? indices, float scaling, Tensor? mix, "
    "Tensor? bias, Tensor handle, bool trains, SymInt out_features) -> (Tensor, Tensor)",
    **NOT_IN_CUDA_GRAPHS,
)
_library.define(
    "linear_grad(Tensor gy, Tensor? delta, Tensor? indices, float scaling, Tensor? mix, "
    "Tensor handle, Tensor base, SymInt in_features) -> Tensor",
    **NOT_IN_CUDA_GRAPHS,
)
for _name, _run, _like in (("linear", _linear, _like_y), ("linear_grad", _linear_grad, _like_gx)):
    # torch 2.6 would compile what an operator runs.
    _library.impl(_name, _disable_dynamo(_run), "CompositeExplicitAutograd")
    torch.library.register_fake(f"pacatune::{_name}", _like, lib=_library)
torch.library.register_autograd("pacatune::linear", _gradients, setup_context=_save, lib=_library)
