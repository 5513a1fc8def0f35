"""Watches gradients and inputs of single weights, and reduces them to a number for each column."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from pacatune.selection.strategies import SKETCH_ROWS, seed_for
from pacatune.tuner.experts import is_expert_parameter
from pacatune.tuner.matrix import as_matrix
from pacatune.tuner.targets import Target

__all__ = ["observe_activations", "observe_gradients", "observe_sketches"]

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
                add(_squares(as_matrix(gradient, target.module, target.parameter_name)))

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
        is_expert = is_expert_parameter(target.module, target.parameter_name)
        if isinstance(target.module, nn.Embedding) or is_expert:
            kind = "weights of experts, whose inputs are" if is_expert else "an embedding, whose"
            raise ValueError(
                f"target {name!r} is {kind}{' inside of their module' if is_expert else ''}"
                f"{'' if is_expert else ' input has no columns'}; activations cannot be collected "
                "for it. Choose by gradient or weight, or leave it out."
            )
    handles = [
        target.module.register_forward_pre_hook(
            _activation_hook(target.module, adders[name], mask, reduce[name]), with_kwargs=True
        )
        for name, target in targets.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _activation_hook(
    module: nn.Module, add: Add, mask: Mask, reduce: Callable[[Tensor], Tensor]
) -> Callable[..., None]:
    def hook(_: nn.Module, args: Any, kwargs: Any) -> None:
        inputs = [*args, *kwargs.values()][:1]
        if isinstance(module, nn.MultiheadAttention):  # one weight for query, key and value
            names = ("query", "key", "value")
            given = {**dict(zip(names, args, strict=False)), **kwargs}
            inputs = list({id(given[name]): given[name] for name in names}.values())
        for x in inputs:
            add(reduce(_tokens(x.detach(), module, mask())))

    return hook


def _tokens(x: Tensor, module: nn.Module, mask: Tensor | None) -> Tensor:
    """Return the inputs of a layer as (N, I)."""
    if isinstance(module, _ConvNd):
        return x.movedim(-1 - len(module.kernel_size), -1).flatten(0, -2)
    if mask is not None and x.dim() == 3 and x.shape[:2] == mask.shape:
        return x[mask.to(x.device).bool()]
    return x.flatten(0, -2) if x.dim() > 1 else x.unsqueeze(0)


def _squares(matrix: Tensor) -> Tensor:
    """Return the squared norm of each column, (I,) in float32 at least."""
    dtype = torch.promote_types(matrix.dtype, torch.float32)
    norms: Tensor = torch.linalg.vector_norm(matrix, dim=0, dtype=dtype)
    return norms.square()
