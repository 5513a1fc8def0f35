"""What a step on a GPU allocates where the same step on a CPU allocates something else.

Fake tensors here have the CPU as their device, since a fake GPU needs a build of PyTorch for one.
Five kernels differ, and only their allocations are made:

    attention   FlashAttention keeps q, k, v, its output and a log-sum-exp, and no repeated heads of
                keys and values; with a mask, the memory-efficient kernel keeps a float copy of it
    dropout     keeps a mask of one byte per element, not a scaled one in the dtype of the input
    loss        TRL's Triton kernels fold tiles of logits without copies of them
    blocks      of a GGUF file are decoded by one kernel, with nothing on the way
    delta       its gradient is one product, in the dtype of delta at once

Each stand-in tells whoever counts that it stands for a kernel.

And one decision: transformers looks at the values of positions to see whether rows hold several
sequences, and builds a causal mask where it cannot look, of which each layer would keep a quadratic
copy. Rows of one sequence run without any mask.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from transformers import masking_utils

from pacatune.grid import layers as grid_layers
from pacatune.grid.formats import Grid
from pacatune.ops import products
from pacatune.residency import put as residency_put
from pacatune.residency import weight as residency
from pacatune.residency.put import Put

# FlashAttention's largest head.
_MAX_FLASH_DIM = 256
# Its backward pass rounds the length of the accumulator of dq up to blocks of this many rows, and
# the head to this many columns.
_FLASH_ROWS, _FLASH_COLUMNS = 128, 32


Launch = Callable[[], None]
"""Takes note of a kernel."""


def _unnoticed() -> None:
    pass


@contextmanager
def allocations_of_gpu(launch: Launch = _unnoticed) -> Iterator[None]:
    """Let attention, dropout, gradients and writes of columns, and TRL's loss allocate as there.

    `launch` is called for each kernel that is not run.
    """
    with ExitStack() as stack:

        def replace(owner: Any, name: str, value: Any) -> None:
            stack.enter_context(patch.object(owner, name, value, create=True))

        replace(F, "scaled_dot_product_attention", partial(attention, launch=launch))
        replace(F, "dropout", dropout)
        replace(products, "_is_on_cpu", lambda x: False)
        replace(products, "_can_widen", lambda device, dtype, wide: True)
        replace(products, "_wide_product", partial(wide_product, launch=launch))
        # Columns are written by one kernel there; of a single weight by `index_copy_`.
        replace(residency, "_is_numpys", lambda memory: False)
        replace(grid_layers, "decode", partial(_decode, launch))
        replace(residency_put, "can_exchange", lambda memory, *values: True)
        replace(residency_put, "exchange", partial(_exchange, launch))
        replace(masking_utils, "find_packed_sequence_indices", lambda position_ids: None)
        with suppress(ImportError):  # of older TRL; the loss that needs it says so
            from trl.kernels import chunked_logprob

            replace(chunked_logprob, "_forward_kernel", _LossKernel(launch))
            replace(chunked_logprob, "_backward_kernel", _LossKernel(launch))
            replace(chunked_logprob, "_use_triton", lambda device: True)
            replace(chunked_logprob, "triton", SimpleNamespace(cdiv=lambda a, b: -(-a // b)))
            # From 16 to 32 bits without a copy.
            replace(chunked_logprob, "_addmm_fp32", partial(_add_product, launch))
        yield


def _exchange(launch: Launch, puts: Sequence[Put], takes: bool = False) -> None:
    """Stand in for the kernel that puts the columns of many weights, or takes them aside."""
    launch()


def _decode(
    launch: Launch, grid: Grid, rows: Tensor, dtype: torch.dtype, scales: Tensor | None
) -> Tensor:
    """Stand in for the kernel that decodes blocks."""
    launch()
    return rows.new_empty(len(rows), rows.shape[1] // grid.block_bytes * grid.block, dtype=dtype)


def wide_product(
    a: Tensor, b: Tensor, scaling: float, dtype: torch.dtype, launch: Launch = _unnoticed
) -> Tensor:
    """Return (M, N) in `dtype` for scaling * a b, with no values."""
    product = a.new_empty(a.shape[0], b.shape[1], dtype=dtype)
    launch()
    return product


def _add_product(launch: Launch, total: Tensor, a: Tensor, b: Tensor) -> None:
    launch()


def dropout(x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    """As F.dropout, by the kernel that GPUs use; keeps one byte per element."""
    if not training or p == 0.0:
        return x
    return torch.native_dropout(x, p, True)[0]


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    launch: Launch = _unnoticed,
) -> Tensor:
    """As F.scaled_dot_product_attention, with the allocations of its GPU kernels and no values.

    From query (B, H, T, D), key (B, G, S, D) and value (B, G, S, E), where G divides H, makes
    (B, H, T, E). Saves q, k, v, the output and N * H numbers; with a mask also that, in the dtype
    of q. The other options allocate nothing: the kernels draw dropout again in backward.
    """
    if torch.is_autocast_enabled("cpu"):
        dtype = torch.get_autocast_dtype("cpu")
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    if attn_mask is not None and attn_mask.dtype != query.dtype:
        attn_mask = torch.empty_like(attn_mask, dtype=query.dtype)
    if attn_mask is not None or max(query.shape[-1], value.shape[-1]) > _MAX_FLASH_DIM:
        repeats = query.shape[1] // key.shape[1]  # the other kernel has no groups
        key, value = (x.repeat_interleave(repeats, 1) if repeats > 1 else x for x in (key, value))
    result: Tensor = _Attention.apply(query, key, value, attn_mask, launch)
    return result


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        launch: Launch,
    ) -> Tensor:
        batch, heads, length, _ = q.shape
        # Stored as (B, T, H, E), like the rows that the projections give.
        out = q.new_empty(batch, length, heads, v.shape[-1]).transpose(1, 2)
        log_sum_exp = q.new_empty(batch, heads, length, dtype=torch.float32)
        ctx.save_for_backward(q, k, v, mask, out, log_sum_exp)
        ctx.launch = launch
        launch()
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, *_ = ctx.saved_tensors
        batch, heads, length, dim = q.shape
        rows, columns = _round_up(length, _FLASH_ROWS), _round_up(dim, _FLASH_COLUMNS)
        accumulator = q.new_empty(batch, heads, rows, columns, dtype=torch.float32)
        row_sums = q.new_empty(batch, heads, rows, dtype=torch.float32)
        gq, gk, gv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        if k.shape[1] != heads:
            # One gradient per head of q first, then their sums.
            expanded = [x.new_empty(batch, heads, *x.shape[2:]) for x in (k, v)]
            del expanded
        del accumulator, row_sums
        ctx.launch()
        return gq, gk, gv, None, None


def _round_up(number: int, step: int) -> int:
    return -(-number // step) * step


class _LossKernel:
    """Stands for a Triton kernel of TRL's loss: launched on a grid, it allocates nothing."""

    def __init__(self, launch: Launch) -> None:
        self._launch = launch

    def __getitem__(self, grid: Any) -> Any:
        return self._run

    def _run(self, *args: Any, **kwargs: Any) -> None:
        self._launch()
