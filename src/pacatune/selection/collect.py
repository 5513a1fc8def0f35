"""Collects what strategies must know about the columns of a model, without training it.

    gradient      each batch is one iteration t: forward, backward, and for each target the squared
                  norms of the columns of dW_t are added up (Sec. 5: sum over t of ||g_t||^2)
    activation    forward passes only: the squares of the inputs of each target, by column
    activation_sketch    forward passes only: a random projection of the inputs to 256 rows

What is kept is one number for each column of each target, or 256 (1 KiB). The gradient of one
weight exists at a time: it is reduced and freed inside the backward pass, as soon as autograd has
computed it. All other weights are frozen, so no gradient of theirs is computed, and nothing is
updated.

Neither the number of processes nor that of accumulation steps matters: the same batches give the
same sums, up to rounding. (The norm of a gradient that is accumulated over several batches could
not be had without holding the gradients of all weights.)
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from pacatune.selection.observers import (
    observe_activations,
    observe_gradients,
    observe_sketches,
)
from pacatune.selection.statistics import ColumnStatistics
from pacatune.selection.strategies import KINDS, SKETCH_ROWS, statistics_of
from pacatune.tuner.columns import find_targets
from pacatune.tuner.config import PacaConfig
from pacatune.tuner.fast_path import without_fast_path
from pacatune.tuner.targets import Target

__all__ = ["collect_statistics"]

LossFunction = Callable[[Any, Any], Tensor]
Sums = dict[str, dict[str, Tensor]]

_OBSERVERS = {
    "gradient": observe_gradients,
    "activation": observe_activations,
    "activation_sketch": observe_sketches,
}


def collect_statistics(
    model: nn.Module,
    batches: Iterable[Any],
    config: PacaConfig,
    *,
    kinds: Iterable[str] | None = None,
    loss_fn: LossFunction | None = None,
    progress: Callable[[int], None] | None = None,
) -> ColumnStatistics:
    """Run batches through a model and collect statistics about the columns of its targets.

    In a process group each process gives its own batches, all get the sums over all of them, and
    all must call this. The model is left as it was: its weights, `requires_grad`, gradients, modes,
    running statistics of BatchNorm, and torch's random numbers.

    Args:
        model: The base, whole on its device and not adapted. It runs in the mode it is in, with
            BatchNorm evaluating; a gradient checkpoint works as in training.
        batches: What is in one iteration each; the paper takes 100.
        config: Says which weights, and by its `selection` what is collected.
        kinds: What to collect instead: "gradient", "activation", "activation_sketch".
        loss_fn: (model, batch) -> scalar loss; by default `model(**batch).loss`, or for activations
            just `model(**batch)`, with the batch on the model's device.
        progress: Called with the number of batches done, after each.

    Raises:
        ValueError: If nothing is to be collected, the model is adapted, wrapped, sharded or without
            weights, a target cannot be observed or was never used, or a loss is not finite.
        TypeError: If a batch is not a dictionary, and there is no `loss_fn`.
    """
    wanted = _kinds(config, kinds)
    _check_model(model)
    targets = find_targets(model, config)
    has_gradient = "gradient" in wanted
    sums: Sums = {name: {} for name in targets}
    num_batches = 0
    with _left_as_it_was(model), _observed(model, targets, wanted, sums) as set_mask:
        for batch in batches:
            set_mask(batch)
            with torch.set_grad_enabled(has_gradient):
                result = _run(model, batch, loss_fn, needs_loss=has_gradient)
            if has_gradient:
                _backward(result, num_batches)
            num_batches += 1
            if progress is not None:
                progress(num_batches)
    return _finish(model, targets, wanted, sums, num_batches)


def _kinds(config: PacaConfig, kinds: Iterable[str] | None) -> list[str]:
    wanted = list(kinds) if kinds is not None else list(statistics_of(str(config.selection)))
    unknown = sorted(set(wanted) - set(KINDS))
    if unknown or not wanted:
        raise ValueError(
            f"`kinds` ({wanted}) must name some of {KINDS}; `selection` ({config.selection!r}) "
            f"needs {list(statistics_of(str(config.selection)))}."
        )
    return wanted


def _check_model(model: nn.Module) -> None:
    if isinstance(model, DistributedDataParallel):
        raise ValueError(
            "`model` is wrapped by DistributedDataParallel; collect before it is wrapped, the sums "
            "are over all processes anyway."
        )
    for name, module in model.named_modules():
        if hasattr(module, "paca_delta") or hasattr(module, "lora_A"):
            raise ValueError(
                f"`model` is adapted ({name!r}); columns are chosen for the base, so collect "
                "before get_peft_model, or from `model.unload()`."
            )
    for name, parameter in model.named_parameters():
        if parameter.is_meta or hasattr(parameter, "placements") or hasattr(parameter, "ds_shape"):
            where = "on the meta device" if parameter.is_meta else "sharded"
            raise ValueError(
                f"`model` has {name!r} {where}; load it whole, collect, and shard it afterwards."
            )


@contextmanager
def _left_as_it_was(model: nn.Module) -> Iterator[None]:
    """Freeze the model for a while, with BatchNorm evaluating."""
    parameters = [(p, p.requires_grad, p.grad) for p in model.parameters()]
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.training]
    devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=devices))
        stack.enter_context(without_fast_path(model))
        for parameter, _, _ in parameters:
            parameter.grad = None
            parameter.requires_grad_(False)
        for norm in norms:
            norm.eval()
        try:
            yield
        finally:
            for parameter, requires_grad, grad in parameters:
                parameter.requires_grad_(requires_grad)
                parameter.grad = grad
            for norm in norms:
                norm.train()


@contextmanager
def _observed(
    model: nn.Module, targets: Mapping[str, Target], kinds: list[str], sums: Sums
) -> Iterator[Callable[[Any], None]]:
    """Let every target add to `sums`; yields what must be called with each batch before it runs."""
    mask: list[Tensor | None] = [None]

    def adder(name: str, kind: str) -> Callable[[Tensor], None]:
        def add(values: Tensor) -> None:
            values = values.detach()
            # Apple's GPUs have no float64, and sketches are large.
            if kind != "activation_sketch" and values.device.type != "mps":
                values = values.double()
            total = sums[name].get(kind)
            sums[name][kind] = values if total is None else total.add_(values)

        return add

    def set_mask(batch: Any) -> None:
        found = batch.get("attention_mask") if isinstance(batch, Mapping) else None
        mask[0] = found if isinstance(found, Tensor) and found.dim() == 2 else None

    with ExitStack() as stack:
        for kind, observe in _OBSERVERS.items():
            if kind in kinds:
                adders = {name: adder(name, kind) for name in targets}
                stack.enter_context(observe(model, targets, adders, lambda: mask[0]))
        yield set_mask


def _run(model: nn.Module, batch: Any, loss_fn: LossFunction | None, *, needs_loss: bool) -> Any:
    if loss_fn is not None:
        return loss_fn(model, batch)
    if not isinstance(batch, Mapping):
        raise TypeError(
            f"a batch is a {type(batch).__name__}; it must be a dictionary of the model's "
            "arguments, or give `loss_fn`."
        )
    device = next(model.parameters()).device
    moved = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}
    output = model(**moved)
    if not needs_loss:
        return output
    loss = getattr(output, "loss", None)
    if loss is None:
        raise ValueError(
            f"the model returns no loss for a batch of {sorted(moved)}; add `labels`, or give "
            "`loss_fn`."
        )
    return loss


def _backward(loss: Any, number: int) -> None:
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        what = f"of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise ValueError(f"the loss of batch {number} is {what}; it must be one number.")
    if not loss.requires_grad:
        raise ValueError(
            f"the loss of batch {number} does not depend on any target; check `target_modules` and "
            "`loss_fn`."
        )
    loss.backward()


def _finish(
    model: nn.Module,
    targets: Mapping[str, Target],
    kinds: list[str],
    sums: Sums,
    num_batches: int,
) -> ColumnStatistics:
    """Add up what all processes have, and refuse targets without anything."""
    device = next(model.parameters()).device
    empty = [torch.zeros(0), torch.tensor([float(num_batches)])]
    dtype = torch.float32 if device.type == "mps" else torch.float64
    shapes = {
        (name, kind): (SKETCH_ROWS,) * (kind == "activation_sketch") + (target.num_columns,)
        for name, target in targets.items()
        for kind in kinds
    }
    parts = [
        sums[name].get(kind, torch.zeros(shape)).to(device, dtype).flatten()
        for (name, kind), shape in shapes.items()
    ]
    flat = torch.cat([*parts, empty[1].to(device, dtype)])
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(flat)
    flat = flat.cpu().double()
    pieces = iter(flat.split([*(len(part) for part in parts), 1]))
    values = {
        name: {kind: next(pieces).view(shapes[name, kind]).clone() for kind in kinds}
        for name in targets
    }
    statistics = ColumnStatistics(values=values, num_batches=round(float(next(pieces))))
    _refuse_unused(statistics)
    return statistics


def _refuse_unused(statistics: ColumnStatistics) -> None:
    unused = [
        (name, kind)
        for name, kinds in statistics.values.items()
        for kind, values in kinds.items()
        if not bool(values.any())
    ]
    if unused:
        name, kind = unused[0]
        raise ValueError(
            f"{len(unused)} targets have no {kind} in {statistics.num_batches} batches, first "
            f"{name!r}: the model does not use them for this data, or no batch has a label. Take "
            "them out of `target_modules`, or give other batches."
        )
