"""Collects what strategies must know about the columns of a model, without training it.

Each batch is one iteration t: forward, backward, and for each target the squared norms of the
columns of dW_t are added up (Sec. 5: sum over t of ||g_t||^2). What is kept is one number for each
column of each target. The gradient of one weight exists at a
time: it is reduced and freed inside the backward pass, as soon as autograd has computed it. All
other weights are frozen, so no gradient of theirs is computed, and nothing is updated.

Neither the number of processes nor that of accumulation steps matters: the same batches give the
same sums, up to rounding. (The norm of a gradient that is accumulated over several batches could
not be had without holding the gradients of all weights.)
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from pacatune.ops.whole import is_shared_out
from pacatune.selection.statistics import ColumnStatistics
from pacatune.tuner.columns import find_targets
from pacatune.tuner.config import PacaConfig
from pacatune.tuner.fast_path import without_fast_path
from pacatune.tuner.targets import Target

__all__ = ["collect_statistics"]

LossFunction = Callable[[Any, Any], Tensor]
Add = Callable[[Tensor], None]


def collect_statistics(
    model: nn.Module,
    batches: Iterable[Any],
    config: PacaConfig,
    *,
    loss_fn: LossFunction | None = None,
) -> ColumnStatistics:
    """Run batches through a model and collect statistics about the columns of its targets.

    In a process group each process gives its own batches, all get the sums over all of them, and
    all must call this. The model is left as it was: its weights, `requires_grad`, gradients, modes,
    running statistics of BatchNorm, and torch's random numbers.

    Args:
        model: The base, whole on its device and not adapted. It runs in the mode it is in, with
            BatchNorm evaluating; a gradient checkpoint works as in training.
        batches: What is in one iteration each; the paper takes 100.
        config: Says which weights; its `selection` must look at gradients.
        loss_fn: (model, batch) -> scalar loss; by default `model(**batch).loss`, with the batch on
            the model's device.

    Returns:
        Numbers for the columns of each target, by which a strategy chooses.

    Raises:
        ValueError: If nothing is to be collected, the model is adapted, wrapped, sharded or without
            weights, a target was never used, or a loss is not finite.
        TypeError: If a batch is not a dictionary, and there is no `loss_fn`.
    """
    if not config.needs_gradients():
        raise ValueError(
            f"`selection` ({config.selection!r}) needs no statistics; make the adapter without."
        )
    _check_model(model)
    collector = _Collector(find_targets(model, config))
    num_batches = 0
    with _left_as_it_was(model), collector.observing():
        for batch in batches:
            with torch.enable_grad():
                loss = _run(model, batch) if loss_fn is None else loss_fn(model, batch)
            _backward(loss, num_batches)
            num_batches += 1
    return collector.finish(num_batches, next(model.parameters()).device)


class _Collector:
    """Watches gradients of targets, and adds up a number for each column."""

    def __init__(self, targets: Mapping[str, Target]) -> None:
        self.targets, self.sums = targets, dict[str, Tensor]()

    def _add(self, name: str, matrix: Tensor) -> None:
        """Add the squared norm of each column, in float64 where the device has it."""
        dtype = torch.promote_types(matrix.dtype, torch.float32)
        norms: Tensor = torch.linalg.vector_norm(matrix.detach(), dim=0, dtype=dtype)
        squares = _precise(norms.square())
        total = self.sums.get(name)
        self.sums[name] = squares if total is None else total.add_(squares)

    @contextmanager
    def observing(self) -> Iterator[None]:
        """Let hooks add to the sums; targets may require gradients for a while."""
        with ExitStack() as stack:
            for handle in self._observe_gradients():
                stack.callback(handle.remove)
            yield

    def _observe_gradients(self) -> Iterator[Any]:
        """Watch dW as autograd computes it, or dy^T x where a quantised weight has none."""
        by_weight: dict[nn.Parameter, list[tuple[Target, Add]]] = {}
        for name, target in self.targets.items():
            weight = getattr(target.module, target.parameter_name, None)  # GPTQ has buffers
            add = partial(self._add, name)
            if type(weight) is nn.Parameter and weight.is_floating_point():
                by_weight.setdefault(weight, []).append((target, add))
            else:
                hook = _gradient_hook(add)
                yield target.module.register_forward_hook(hook, with_kwargs=True)
        for weight, uses in by_weight.items():
            weight.requires_grad_(True)
            yield weight.register_post_accumulate_grad_hook(_weight_hook(uses))

    def finish(self, num_batches: int, device: torch.device) -> ColumnStatistics:
        """Add up what all processes have, and refuse targets without anything."""
        sizes = [target.num_columns for target in self.targets.values()]
        pairs = zip(self.targets, sizes, strict=True)
        parts = [self.sums.get(name, torch.zeros(size, device=device)) for name, size in pairs]
        parts.append(torch.tensor([float(num_batches)], device=device))
        flat = torch.cat([_precise(part.to(device)) for part in parts])
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(flat)
        *sums, count = flat.cpu().double().split([*sizes, 1])
        by_name = zip(self.targets, sums, strict=True)
        values = {name: {"gradient": squares.clone()} for name, squares in by_name}
        statistics = ColumnStatistics(values=values, num_batches=round(float(count)))
        unused = [name for name, kinds in values.items() if not kinds["gradient"].any()]
        if unused:
            raise ValueError(
                f"{len(unused)} targets have no gradient in {statistics.num_batches} batches, "
                f"first {unused[0]!r}: the model does not use them for this data, or no batch has "
                "a label. Take them out of `target_modules`, or give other batches."
            )
        return statistics


def _precise(values: Tensor) -> Tensor:
    """Return values in float64, which Apple's GPUs have not."""
    return values.float() if values.device.type == "mps" else values.double()


def _weight_hook(uses: list[tuple[Target, Add]]) -> Callable[[Tensor], None]:
    def reduce(weight: Tensor) -> None:
        gradient = weight.grad
        assert gradient is not None, "called when there is one"
        weight.grad = None  # before anything else is computed: it is as large as the weight
        for target, add in uses:
            if gradient.is_sparse:  # an embedding's: the rows of the tokens that occur
                add(gradient.coalesce().values())
            else:
                add(target.layout.matrix(gradient))

    return reduce


def _gradient_hook(add: Add) -> Callable[..., Any]:
    def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        x = args[0] if args else next(iter(kwargs.values()))
        anchor = torch.zeros((), device=output.device, requires_grad=True)
        return _Observed.apply(output, x.detach(), anchor, add)

    return hook


class _Observed(torch.autograd.Function):
    """The identity on a layer's output that keeps the input and reduces dy^T x on the way back.

    Saved like the input of a trained layer, so that checkpointing recomputes it.
    """

    @staticmethod
    def forward(ctx: Any, output: Tensor, x: Tensor, anchor: Tensor, add: Add) -> Tensor:
        """Return the output; `anchor` makes it require a gradient where the input does not."""
        ctx.save_for_backward(x)
        ctx.add = add
        return output.clone()  # a view could not be changed in place by what follows

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        """Pass the gradient on, and add the squares of the columns of dW."""
        (x,), (gradient,) = ctx.saved_tensors, grads
        dy = gradient.flatten(0, -2).to(x.dtype)
        ctx.add(dy.t() @ x.flatten(0, -2))
        return gradient, None, None, None


def _check_model(model: nn.Module) -> None:
    wrong = ""
    if isinstance(model, DistributedDataParallel):
        wrong = "wrapped by DistributedDataParallel"
    for name, module in model.named_modules():
        if hasattr(module, "paca_delta") or hasattr(module, "lora_A"):
            wrong = f"adapted ({name!r})"
    for name, parameter in model.named_parameters():
        if parameter.is_meta or is_shared_out(parameter):
            wrong = f"on the meta device or sharded ({name!r})"
    if wrong:
        raise ValueError(
            f"`model` is {wrong}; collect from the whole base, before it is wrapped, sharded or "
            "adapted (`model.unload()` returns the base)."
        )


@contextmanager
def _left_as_it_was(model: nn.Module) -> Iterator[None]:
    """Freeze the model for a while, with BatchNorm evaluating."""
    parameters = [(p, p.requires_grad, p.grad) for p in model.parameters()]
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.training]
    devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=devices), without_fast_path(model):
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


def _run(model: nn.Module, batch: Any) -> Any:
    """Return the loss of a batch, or None where the model returns none."""
    if not isinstance(batch, Mapping):
        raise TypeError(
            f"a batch is a {type(batch).__name__}; it must be a dictionary of the model's "
            "arguments, or give `loss_fn`."
        )
    device = next(model.parameters()).device
    moved = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}
    return getattr(model(**moved), "loss", None)


def _backward(loss: Any, number: int) -> None:
    if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.requires_grad:
        shape = tuple(loss.shape) if isinstance(loss, Tensor) else loss
        raise ValueError(
            f"the loss of batch {number} ({shape}) must be one number that depends on the targets; "
            "add `labels` or give `loss_fn`, and check `target_modules`."
        )
    loss.backward()
