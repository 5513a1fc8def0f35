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

from pacatune.selection.statistics import ColumnStatistics
from pacatune.strategies import KINDS, SKETCH_ROWS, seed_for
from pacatune.tuner.attention import without_fast_path
from pacatune.tuner.columns import find_targets
from pacatune.tuner.config import PacaConfig
from pacatune.tuner.layout import EmbeddingLayout, Layout
from pacatune.tuner.targets import Target

__all__ = [
    "collect_statistics",
    "observe_activations",
    "observe_gradients",
    "observe_sketches",
]


# Watches gradients and inputs of single weights, and reduces them to a number for each column.


Add = Callable[[Tensor], None]
Mask = Callable[[], Tensor | None]


@contextmanager
def observe_gradients(
    model: nn.Module, targets: Mapping[str, Target], adders: Mapping[str, Add], mask: Mask
) -> Iterator[None]:
    """Add ||dW[:, i]||^2 of every backward pass, for each target.

    The gradient of a weight is what autograd computes, however the module uses it. The weight of a
    quantised layer has none, so dW = dy^T x is computed there from the layer's input, for each of
    its calls.

    Args:
        model: Frozen; its targets require gradients for a while.
        targets: By name.
        adders: Name -> what takes (I,) squares.
        mask: Not used.
    """
    handles: list[Any] = []
    by_weight: dict[nn.Parameter, list[tuple[Target, Add]]] = {}
    for name, target in targets.items():
        weight = getattr(target.module, target.parameter_name)
        if isinstance(weight, nn.Parameter) and _is_plain(weight):
            by_weight.setdefault(weight, []).append((target, adders[name]))
        else:
            hook = _gradient_hook(adders[name])
            handles.append(target.module.register_forward_hook(hook, with_kwargs=True))
    for weight, uses in by_weight.items():
        weight.requires_grad_(True)
        handles.append(weight.register_post_accumulate_grad_hook(_weight_hook(uses)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _is_plain(weight: Tensor) -> bool:
    return weight.is_floating_point() and type(weight) is nn.Parameter


def _weight_hook(uses: list[tuple[Target, Add]]) -> Callable[[Tensor], None]:
    def reduce(weight: Tensor) -> None:
        gradient = weight.grad
        assert gradient is not None, "called when there is one"
        weight.grad = None  # before anything else is computed: it is as large as the weight
        for target, add in uses:
            if gradient.is_sparse:  # an embedding's: the rows of the tokens that occur
                add(_squares(gradient.coalesce().values()))
            else:
                add(_squares(target.layout.matrix(gradient)))

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
        ctx.add(_squares(dy.t() @ x.flatten(0, -2)))
        return gradient, None, None, None


@contextmanager
def observe_activations(
    model: nn.Module, targets: Mapping[str, Target], adders: Mapping[str, Add], mask: Mask
) -> Iterator[None]:
    """Add the squares of the inputs of every forward pass by column, for each target.

    Args:
        model: In any state.
        targets: By name.
        adders: Name -> what takes (I,) squares.
        mask: Gives the (B, T) attention mask of the batch or None; tokens that it leaves out do not
            count in inputs of (B, T, I).

    Raises:
        ValueError: If a target has no input with a value for each column.
    """
    reduce = dict.fromkeys(targets, _squares)
    with _observe_inputs(targets, adders, mask, reduce):
        yield


@contextmanager
def observe_sketches(
    model: nn.Module, targets: Mapping[str, Target], adders: Mapping[str, Add], mask: Mask
) -> Iterator[None]:
    """Add a random projection of the inputs of every forward pass, for each target.

    Each token is added to one row of a (256, I) matrix, with a sign, both drawn from the target's
    own generator; processes draw different ones. On average S^T S is X^T X.

    Args:
        model: In any state.
        targets: By name.
        adders: Name -> what takes (256, I) sums.
        mask: As for `observe_activations`.

    Raises:
        ValueError: As for `observe_activations`.

    Source: CountSketch, Charikar, Chen and Farach-Colton 2002.
    """
    is_distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    process = torch.distributed.get_rank() if is_distributed else 0
    reduce = {name: _Sketch(seed_for(process, name)) for name in targets}
    with _observe_inputs(targets, adders, mask, reduce):
        yield


class _Sketch:
    """Projects tokens (N, I) to (256, I), differently at each call."""

    def __init__(self, seed: int) -> None:
        self._generator = torch.Generator().manual_seed(seed)

    def __call__(self, tokens: Tensor) -> Tensor:
        shape = (len(tokens),)
        rows = torch.randint(SKETCH_ROWS, shape, generator=self._generator).to(tokens.device)
        signs = 2 * torch.randint(2, shape, generator=self._generator).to(tokens.device) - 1
        values = tokens.to(torch.promote_types(tokens.dtype, torch.float32))
        result = values.new_zeros(SKETCH_ROWS, values.shape[1])
        return result.index_add_(0, rows, signs.to(values).unsqueeze(1) * values)


@contextmanager
def _observe_inputs(
    targets: Mapping[str, Target],
    adders: Mapping[str, Add],
    mask: Mask,
    reduce: Mapping[str, Callable[[Tensor], Tensor]],
) -> Iterator[None]:
    for name, target in targets.items():
        if not target.layout.has_inputs:
            what = (
                "an embedding, whose input has no columns"
                if isinstance(target.layout, EmbeddingLayout)
                else "weights of experts, whose inputs are inside of their module"
            )
            raise ValueError(
                f"target {name!r} is {what}; activations cannot be collected for it. Choose by "
                "gradient or weight, normalise by weight, or leave it out."
            )
    handles = [
        target.module.register_forward_pre_hook(
            _activation_hook(target.layout, adders[name], mask, reduce[name]), with_kwargs=True
        )
        for name, target in targets.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _activation_hook(
    layout: Layout, add: Add, mask: Mask, reduce: Callable[[Tensor], Tensor]
) -> Callable[..., None]:
    def hook(_: nn.Module, args: Any, kwargs: Any) -> None:
        for x in layout.inputs(args, kwargs):
            add(reduce(layout.tokens(x.detach(), mask())))

    return hook


def _squares(matrix: Tensor) -> Tensor:
    """Return the squared norm of each column, (I,) in float32 at least."""
    dtype = torch.promote_types(matrix.dtype, torch.float32)
    norms: Tensor = torch.linalg.vector_norm(matrix, dim=0, dtype=dtype)
    return norms.square()


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
        config: Says which weights, and by its `selection` and `normalize` what is collected.
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
    needed = list(config.statistics())
    wanted = list(kinds) if kinds is not None else needed
    unknown = sorted(set(wanted) - set(KINDS))
    if unknown or not wanted:
        raise ValueError(
            f"`kinds` ({wanted}) must name some of {KINDS}; `selection` ({config.selection!r}) and "
            f"`normalize` ({config.normalize!r}) need {needed}."
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
