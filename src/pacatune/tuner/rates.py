"""Steps normalised per column: an optimiser's step of a delta, times a rate for each column.

    before a step    a copy of delta is kept
    after it         delta <- copy + rate * (delta - copy)

So column j moves as if its learning rate were lr * rate_j, and everything else is as without rates:
delta is what the equations say, in the model as in files, and its gradient is its gradient. Only
while an optimiser runs is anything done, and nothing at all where no adapter has rates.

torch calls back before and after each step of an optimiser. Of optimisers around another one (that
of accelerate, ZeroRedundancyOptimizer, SAM) the inner one steps. Whoever steps on something other
than the deltas themselves (FSDP1's and DeepSpeed's flat parameters), or keeps what it has stepped
to (schedule-free averages, LBFGS), is refused at its first step.
"""

import gc
import threading
import weakref
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim.optimizer import (
    Optimizer,
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

__all__ = ["Rates", "rates_by_input", "rates_by_weight", "watch"]

# Rates of columns whose inputs are rare rest on few tokens; one of 0 would never be trained.
_LEAST, _MOST = 2.0**-10, 16.0


def rates_by_input(squares: Tensor) -> Tensor:
    """Return rates for steps that change the output by as much in every column.

    An Adam step moves each value of a column by about the learning rate, so it changes the output
    by that times the column's input: rate_j = m / rms(x_j), with m the geometric mean of the rms of
    all the layer's inputs. A typical column keeps its rate, whichever columns are chosen.

    Args:
        squares: (I,) sums of squares of the inputs; their scale does not matter.

    Returns:
        (I,) float64 between 2^-10 and 16.
    """
    return _relative(squares.double().sqrt()).reciprocal().clamp(_LEAST, _MOST)


def rates_by_weight(matrix: Tensor) -> Tensor:
    """Return rates in proportion to the norms of columns: each moves by as large a part of itself.

    Multiply an input by a, divide its column by a, and the layer is the same. Rates by input are
    then divided by a; so are these, which need no data. (Rates of 1 / norm would be multiplied.)

    Args:
        matrix: (O, I) weight.

    Returns:
        (I,) float64 between 2^-10 and 16, with the geometric mean 1 but for these bounds.
    """
    norms = torch.linalg.vector_norm(matrix, dim=0, dtype=torch.float64)
    return _relative(norms.cpu()).clamp(_LEAST, _MOST)


def _relative(sizes: Tensor) -> Tensor:
    """Return sizes over their geometric mean, zeros aside."""
    positive = sizes[sizes > 0]
    return sizes / positive.log().mean().exp() if len(positive) else torch.ones_like(sizes)


class Rates:
    """The rates of one adapter's columns in one layer.

    Args:
        values: (R,) or, of G groups of outputs, (G, R).
        delta_shape: Shape of the update, with its R columns in dimension `delta_dim`.
        delta_dim: That dimension; that of the outputs is before it.
    """

    def __init__(self, values: Any, delta_shape: tuple[int, ...], delta_dim: int) -> None:
        factors = torch.tensor(values, dtype=torch.float64, device="cpu")
        if factors.dim() == 2:
            num_rows = delta_shape[delta_dim - 1] // len(factors)
            factors = factors.repeat_interleave(num_rows, 0)
        num_after = len(delta_shape) - delta_dim - 1
        self.delta_shape = torch.Size(delta_shape)
        self.factors = factors.view(*factors.shape, *[1] * num_after)
        """What broadcasts to the update."""
        self._last: tuple[Any, Tensor] | None = None

    def of(self, parameter: Any, local: Tensor) -> Tensor:
        """Return the factors of what this process has of an update, in its dtype and place."""
        last = self._last
        key = local.dtype, local.device, local.shape
        if last is None or last[0] != key:
            factors = self.factors if local is parameter else _part(self.factors, parameter)
            last = self._last = key, factors.to(local)
        return last[1]


def _part(factors: Tensor, parameter: Any) -> Tensor:
    """Return the factors of this process's part of a DTensor."""
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    sizes, starts = compute_local_shape_and_global_offset(
        parameter.shape, parameter.device_mesh, parameter.placements
    )
    for dim in range(-1, -factors.dim() - 1, -1):
        if factors.shape[dim] > 1 and len(sizes) >= -dim:
            factors = factors.narrow(dim, starts[dim], sizes[dim])
    return factors


_HOLDERS: "weakref.WeakSet[Any]" = weakref.WeakSet()


def watch(holder: nn.Module) -> None:
    """Normalise the steps of `holder.weight` by `holder.rates`, as long as it has them."""
    _HOLDERS.add(holder)


class _Kept(NamedTuple):
    parameter: Any
    rates: Rates
    before: Tensor


_STEP = threading.local()
# By parts of class names, since these come from packages that need not be there.
_KEEP_VALUES = ("LBFGS", "ScheduleFree", "Lomo")


def _before_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    _STEP.kept = None
    holders = _holders()
    if not holders or any(isinstance(inner, Optimizer) for inner in vars(optimizer).values()):
        return
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    if _are_flat(optimizer, parameters, holders):
        gc.collect()  # perhaps they are of a model that nobody has any more
        if _are_flat(optimizer, parameters, holders := _holders()):
            raise ValueError(
                "`normalize` multiplies the steps of single columns, and this optimizer's "
                "parameters are flat buffers in which there are none (FSDP1, DeepSpeed); drop "
                "`normalize`, or shard the model by FSDP2."
            )
    rates = {id(holder._parameters.get("weight")): holder.rates for holder in holders}
    found = [(p, rates[id(p)]) for p in parameters if id(p) in rates]
    for parameter, one in found:
        _check(optimizer, parameter, one)
    _STEP.kept = [_Kept(p, one, _local(p).detach().clone()) for p, one in found]


def _after_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    kept, _STEP.kept = getattr(_STEP, "kept", None), None
    with torch.no_grad():
        for parameter, rates, before in kept or ():
            local = _local(parameter)
            # Exact for a rate of 1, and where the step was left out (an overflow in 16 bits).
            local.copy_(before.lerp_(local, rates.of(parameter, local)))


def _local(parameter: Any) -> Tensor:
    """Return what this process has of a parameter."""
    local: Tensor = getattr(parameter, "_local_tensor", parameter)
    return local


def _holders() -> list[Any]:
    return [holder for holder in _HOLDERS if holder.rates is not None]


def _are_flat(optimizer: Optimizer, parameters: list[Any], holders: list[Any]) -> bool:
    """Whether an optimizer has, in place of deltas, buffers that many parameters share."""
    weights = [holder._parameters.get("weight") for holder in holders]
    # FSDP1 takes parameters out of their modules; DeepSpeed leaves marks on them.
    if any(hasattr(parameter, "_is_flat_param") for parameter in parameters):
        return any(weight is None for weight in weights)
    marked = [w for w in weights if hasattr(w, "ds_id") or hasattr(w, "_hp_mapping")]
    # DeepSpeed keeps models that nobody else has any more, and whose optimizer is another one.
    # Where none is named, all of their buffers are with other processes.
    named = [is_its for w in marked if (is_its := _is_stepped_by(optimizer, w)) is not None]
    return any(named) or bool(marked and not named)


def _is_stepped_by(optimizer: Optimizer, weight: Any) -> bool | None:
    """Whether it is the optimizer that DeepSpeed has for a parameter; None where it names none."""
    if hasattr(weight, "_z3_optimizer"):
        return weight._z3_optimizer.optimizer is optimizer
    fragment = getattr(getattr(weight, "_hp_mapping", None), "hp_fragment", None)
    if fragment is None:
        return None
    buffers = [p for group in optimizer.param_groups for p in group["params"]]
    place = fragment.untyped_storage().data_ptr()
    return any(p.untyped_storage().data_ptr() == place for p in buffers)


def _check(optimizer: Optimizer, parameter: Tensor, rates: Rates) -> None:
    kind = type(optimizer).__name__
    if any(name in kind for name in _KEEP_VALUES):
        raise ValueError(
            f"`normalize` multiplies an optimizer's steps, and {kind} keeps the values that it has "
            "stepped to, or steps elsewhere; drop `normalize`, or choose another optimizer, such "
            "as AdamW."
        )
    if parameter.shape != rates.delta_shape:
        raise ValueError(
            f"`normalize`: the optimizer has an update of shape {tuple(parameter.shape)}, which is "
            f"{tuple(rates.delta_shape)} in the model (FSDP1 with `use_orig_params`); drop "
            "`normalize`, or shard the model by FSDP2."
        )


register_optimizer_step_pre_hook(_before_step)
register_optimizer_step_post_hook(_after_step)
