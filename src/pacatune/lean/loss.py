"""Cross-entropy of a linear map without its (N, V) output, which is the largest tensor of all.

Plain autograd keeps the logits in the model's dtype, in float32, and their log-softmax: ten bytes
per token and word in bfloat16. Here rows are taken in chunks: logits, loss and the gradients of
this chunk, in that order, and the logits are gone. Backward multiplies by one number. Rows that the
loss ignores are left out, which plain cross-entropy multiplies all the same.
"""

from collections.abc import Callable
from functools import partial
from types import EllipsisType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F

from pacatune.lean.labels import Labels
from pacatune.ops.tracing import NOT_LEAN, refuse_second_derivative

Transform = Callable[[Tensor], Tensor]

# Logits per chunk: 128 MiB in float32, and a few times as much while its gradient is computed.
_MAX_LOGITS = 2**25
_MIN_ROWS = 64
# Rows of a GEMM's tile on GPUs: what is left of one computes nothing.
_TILE_ROWS = 128


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    transform: Transform | None = None,
    chunk_rows: int | None = None,
) -> Tensor:
    """Return F.cross_entropy(transform(x weight^T + bias), target), never holding all logits.

    Forward   for chunks of rows: logits, loss, and dx, d(weight), d(bias) of them
    Backward  multiplies these by the gradient of the loss
    Saves dx of the rows that count, and for a trained weight its gradient in float32.

    Args:
        x: (N, I) rows.
        weight: (V, I) of the head, frozen or trained.
        target: (N,) int64 in [0, V), or `ignore_index`.
        bias: (V,) or None.
        ignore_index: Target of rows that are left out.
        reduction: "mean" over the rows that count, or "sum".
        label_smoothing: As in F.cross_entropy.
        transform: What happens to logits before the loss, elementwise and without parameters: a
            cast to float32, a soft cap.
        chunk_rows: Rows per chunk; by default so many that a chunk has up to 2^25 logits.

    Returns:
        A number in the dtype of the transformed logits.
    """
    device_type, dtype = x.device.type, x.dtype
    is_autocast = torch.is_autocast_enabled(device_type) and x.itemsize < 8
    if is_autocast:
        dtype = torch.get_autocast_dtype(device_type)
    loss_of = partial(_loss_of, transform, is_autocast, label_smoothing)
    rows = chunk_rows or _rows_per_chunk(len(weight))
    places = _places_of(target, ignore_index)
    call = places, reduction == "mean", rows, dtype, loss_of
    with torch.autocast(device_type, enabled=False):
        return _LinearCrossEntropy.apply(x, weight, bias, target.as_subclass(Tensor), call)


def _places_of(target: Tensor, ignore_index: int) -> Tensor:
    """Return the rows that count; their number is read by the host."""
    copy = target.on_host() if isinstance(target, Labels) else None
    if copy is None:
        return _nonzero(target != ignore_index)
    places = _nonzero(copy != ignore_index)
    if target.is_cuda:
        places = places.pin_memory()
    return places.to(target.device, non_blocking=True)


def _nonzero(counts: Tensor) -> Tensor:
    return counts.nonzero().squeeze(1)


def _loss_of(
    transform: Transform | None,
    is_autocast: bool,
    label_smoothing: float,
    logits: Tensor,
    target: Tensor,
) -> Tensor:
    """Return the sum over rows, in the dtype of plain cross-entropy."""
    logits = logits if transform is None else transform(logits)
    logits = logits.float() if is_autocast and logits.itemsize < 4 else logits
    return F.cross_entropy(logits, target, reduction="sum", label_smoothing=label_smoothing)


def _rows_per_chunk(num_words: int) -> int:
    """Return the rows whose logits have the size of a chunk, in whole tiles where there is one."""
    rows = max(_MIN_ROWS, _MAX_LOGITS // num_words)
    return rows if rows < _TILE_ROWS else rows // _TILE_ROWS * _TILE_ROWS


class _LinearCrossEntropy(torch.autograd.Function):
    """See `linear_cross_entropy`."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, call: Any
    ) -> Tensor:
        places, is_mean, rows, dtype, loss_of = call
        ctx.inputs = x.shape, x.dtype, weight.dtype, None if bias is None else bias.dtype
        chunks = _Chunks(weight, bias, dtype, loss_of, ctx.needs_input_grad)
        for of_chunk in places.split(rows):  # one without rows, if none counts
            chunks.add(of_chunk, x, target)
        losses = torch.stack(chunks.losses)
        wide = torch.promote_types(losses.dtype, torch.float32)
        loss = losses.sum(dtype=wide).to(losses.dtype)
        gx = None if chunks.gx is None else torch.cat(chunks.gx)
        ctx.num_counted = len(places) if is_mean else 1
        ctx.is_whole = len(places) == len(x)
        ctx.save_for_backward(places, gx, chunks.gweight, chunks.gbias)
        return loss / len(places) if is_mean else loss

    @staticmethod
    def backward(ctx: Any, gloss: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative("linear_cross_entropy", NOT_LEAN)
        places, gx, gweight, gbias = ctx.saved_tensors
        shape, *dtypes = ctx.inputs
        factor = gloss / ctx.num_counted if ctx.num_counted else gloss * 0
        gx, gweight, gbias = (
            None if g is None else (g * factor).to(dtype)
            for g, dtype in zip((gx, gweight, gbias), dtypes, strict=True)
        )
        if gx is not None and not ctx.is_whole:
            gx = gx.new_zeros(shape).index_copy_(0, places, gx)
        return gx, gweight, gbias, None, None


def _sum_like(parameter: Tensor) -> Tensor:
    wide = torch.promote_types(parameter.dtype, torch.float32)
    return torch.zeros_like(parameter, dtype=wide)


class _Chunks:
    """Sums up losses, and the gradients that are needed, over chunks of rows."""

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        dtype: torch.dtype,
        loss_of: Callable[[Tensor, Tensor], Tensor],
        needed: tuple[bool, ...],
    ) -> None:
        needs_x, needs_weight, needs_bias, *_ = needed
        self._weight, self._bias = weight.to(dtype), None if bias is None else bias.to(dtype)
        self._loss_of, self._is_needed = loss_of, needs_x or needs_weight or needs_bias
        self.losses: list[Tensor] = []
        self.gx: list[Tensor] | None = [] if needs_x else None
        self.gweight = _sum_like(weight) if needs_weight else None
        self.gbias = _sum_like(bias) if needs_bias and bias is not None else None

    def add(self, places: Tensor, x: Tensor, target: Tensor) -> None:
        """Compute the rows at `places`, (C,)."""
        x = (x if len(places) == len(x) else x.index_select(0, places)).to(self._weight.dtype)
        logits = F.linear(x, self._weight, self._bias)
        # The graph of a chunk is no concern of hooks around the loss.
        with torch.enable_grad(), saved_tensors_hooks(Tensor.detach, lambda x: x):
            logits.requires_grad_(self._is_needed)
            loss = self._loss_of(logits, target.index_select(0, places))
        self.losses.append(loss.detach())
        if not self._is_needed:
            return
        (glogits,) = torch.autograd.grad(loss, logits)
        if self.gx is not None:
            self.gx.append(glogits.mm(self._weight))
        if self.gweight is not None:
            self.gweight += glogits.t().mm(x)
        if self.gbias is not None:
            self.gbias += glogits.sum(0)


# Logits that are computed when somebody reads them, and not at all if only their loss is wanted.
#
# A model computes logits, does something to them (a cast, a soft cap, a shift), and hands them to
# its loss. In place of the first, the head returns a `LazyLogits`: it remembers the last hidden
# states and what is done to the logits, and when torch's cross-entropy is called with it, computes
# that in chunks (`linear_cross_entropy`). So every model's own loss, with its own normalisation and
# masks, stays in use. Any other use computes the logits as the head would have.


class LazyLogits:
    """Stands for steps(x weight^T + bias).

    Args:
        x: (..., I) hidden states.
        head: Linear layer; its (V, I) weight is read when it is needed, and not kept.
        steps: Elementwise operations on the logits, in their order.
    """

    def __init__(self, x: Tensor, head: nn.Linear, steps: tuple[Transform, ...] = ()) -> None:
        self._x, self._head, self._steps = x, head, steps
        self._logits: Tensor | None = None

    @property
    def shape(self) -> torch.Size:
        """(..., V)."""
        return torch.Size((*self._x.shape[:-1], self._head.out_features))

    @property
    def device(self) -> torch.device:
        """Where they would be."""
        return self._x.device

    def size(self, dim: int | None = None) -> Any:
        """Return the shape, or one of its numbers."""
        return self.shape if dim is None else self.shape[dim]

    def dim(self) -> int:
        """Return the number of dimensions."""
        return self._x.dim()

    def compute(self) -> Tensor:
        """Return the (..., V) logits."""
        if self._logits is None:
            self._logits = self._transform(F.linear(self._x, self._head.weight, self._head.bias))
        return self._logits

    def _transform(self, logits: Tensor) -> Tensor:
        for step in self._steps:
            logits = step(logits)
        return logits

    def _with(self, x: Tensor) -> "LazyLogits":
        return LazyLogits(x, self._head, self._steps)

    def _then(self, step: Transform) -> "LazyLogits":
        return LazyLogits(self._x, self._head, (*self._steps, step))

    def float(self) -> "LazyLogits":
        """Cast to float32."""
        return self._then(Tensor.float)

    def contiguous(self) -> "LazyLogits":
        """Change nothing."""
        return self

    def tanh(self) -> "LazyLogits":
        """Apply tanh."""
        return self._then(torch.tanh)

    def __truediv__(self, number: Any) -> Any:
        if isinstance(number, int | float):
            return self._then(lambda logits: logits / number)
        return self.compute() / _computed(number)

    def __mul__(self, number: Any) -> Any:
        if isinstance(number, int | float):
            return self._then(lambda logits: logits * number)
        return self.compute() * _computed(number)

    __rmul__ = __mul__

    def view(self, *shape: Any) -> Any:
        """Flatten the leading dimensions if that is what is asked for."""
        sizes = tuple(shape[0]) if len(shape) == 1 and isinstance(shape[0], tuple) else shape
        num_words = self._head.out_features
        if sizes in ((-1, num_words), (self._x.shape[:-1].numel(), num_words)):
            return self._with(self._x.reshape(-1, self._x.shape[-1]))
        return self.compute().view(*shape)

    reshape = view

    def __getitem__(self, index: Any) -> Any:
        if _keeps_last(index, self.dim()):
            return self._with(self._x[index])
        return self.compute()[index]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # protocols that no tensor has: copying, arrays
            raise AttributeError(name)
        return getattr(self.compute(), name)

    def __len__(self) -> int:
        return self.shape[0]

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if function is torch.tanh and isinstance(args[0], cls) and len(args) == 1 and not kwargs:
            return args[0].tanh()
        if function is F.cross_entropy:
            loss = _cross_entropy(*args, **kwargs)
            if loss is not None:
                return loss
        args = tuple(_computed(argument) for argument in args)
        return function(*args, **{name: _computed(value) for name, value in kwargs.items()})


def _cross_entropy(
    input: Any,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: Any = None,
    ignore_index: int = -100,
    reduce: Any = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor | None:
    """Compute torch's cross-entropy in chunks; None where it must see all logits."""
    if not isinstance(input, LazyLogits) or isinstance(target, LazyLogits):
        return None
    is_plain = weight is None and size_average is None and reduce is None
    is_plain &= input.dim() == 2 and target.dim() == 1 and target.dtype == torch.int64
    if not is_plain or reduction not in ("mean", "sum") or len(target) != len(input):
        return None
    return linear_cross_entropy(
        input._x,
        input._head.weight,
        target,
        input._head.bias,
        ignore_index=ignore_index,
        reduction=reduction,
        label_smoothing=label_smoothing,
        transform=input._transform if input._steps else None,
    )


def _computed(value: Any) -> Any:
    return value.compute() if isinstance(value, LazyLogits) else value


def _keeps_last(index: Any, num_dims: int) -> bool:
    """Whether an index leaves the last dimension alone."""
    if isinstance(index, Tensor):
        return index.dtype == torch.bool and index.dim() < num_dims
    parts = index if isinstance(index, tuple) else (index,)
    if not all(isinstance(part, int | slice | EllipsisType) for part in parts):
        return False
    if len([part for part in parts if part is not Ellipsis]) < num_dims and Ellipsis not in parts:
        return True
    return bool(parts[-1] == slice(None))
