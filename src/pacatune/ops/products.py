"""Products with few columns: in the order and the dtype in which devices form them fastest."""

import functools
from typing import Any

import torch
from torch import Tensor

from pacatune.precision import is_out_of_memory

# Up to so many columns for each of rank, GPUs read dy once, by half the launches, for up to twice
# the operations: counted, not timed. On CPUs that takes longer.
_FEW_PER_RANK = 4
# For operators whose Python must run each time: torch cuts CUDA graphs there, since 2.8.
NOT_IN_CUDA_GRAPHS: dict[str, Any] = (
    {"tags": (torch.Tag.cudagraph_unsafe,)} if hasattr(torch.Tag, "cudagraph_unsafe") else {}
)


def autocast(x: Tensor) -> Tensor:
    """Cast an input as torch.autocast does for linear layers, if it is on."""
    device_type = x.device.type
    if torch.is_autocast_enabled(device_type) and x.is_floating_point() and x.itemsize < 8:
        return x.to(torch.get_autocast_dtype(device_type))
    return x


def owned(y: Tensor) -> Tensor:
    """Return `y` as its own tensor, no copy: what a Function returns as a view is read-only."""
    # Compilers know how to make their own.
    return y if torch.compiler.is_compiling() or not y._is_view() else y.data


def thin_product(gy_NO: Tensor, update_OR: Tensor) -> Tensor:
    """Return dy update as (N, R), by the faster order."""
    if torch.compiler.is_compiling() or not _is_on_cpu(gy_NO):
        return gy_NO.mm(update_OR)
    if _is_faster_transposed(gy_NO, update_OR.shape[1]):
        return update_OR.t().mm(gy_NO.t()).t()
    return gy_NO.mm(update_OR)


def grad_delta(gy_NO: Tensor, x_NR: Tensor, scaling: float, dtype: torch.dtype) -> Tensor:
    """Return scaling * dy^T x[..., indices] as (O, R) in the dtype of delta (Eq. 9).

    On GPUs one GEMM, which scales, and which stores the dtype of delta where torch has such a one.
    On CPUs with many tokens for the rank computed as (x^T dy)^T, which is faster there. Compilers
    fuse what follows a product.
    """
    is_on_cpu = _is_on_cpu(gy_NO)
    if not is_on_cpu and not torch.compiler.is_compiling():
        return _scaled_product(gy_NO.t(), x_NR, scaling, dtype)
    if is_on_cpu and _is_faster_transposed(gy_NO, x_NR.shape[1]):
        gdelta = x_NR.t().mm(gy_NO).t()
    else:
        gdelta = gy_NO.t().mm(x_NR)
    gdelta = gdelta.to(dtype, memory_format=torch.contiguous_format)
    return gdelta if scaling == 1.0 else gdelta.mul_(scaling)


def grad_factors(
    gy_NO: Tensor, x_NC: Tensor, delta: Tensor, mix: Tensor, scaling: float
) -> tuple[Tensor, Tensor]:
    """Return the gradients of delta (O, R) and mix (R, C).

    d(delta) = scaling * dy^T (x mix^T)    d(mix) = scaling * (dy delta)^T x

    By four thin products, without the (O, C) gradient of their product; or by it, if it is cheaper.
    """
    rank, num_columns = mix.shape
    if num_columns <= _FEW_PER_RANK * rank and not _is_on_cpu(gy_NO):
        wide = torch.promote_types(delta.dtype, torch.float32)
        grad_OC = grad_delta(gy_NO, x_NC, scaling, wide)
        gdelta, gmix = grad_OC.mm(cast(mix, wide).t()), cast(delta, wide).t().mm(grad_OC)
        return cast(gdelta, delta.dtype), cast(gmix, mix.dtype)
    h_NR = thin_product(x_NC, cast(mix, x_NC.dtype).t())
    g_NR = thin_product(gy_NO, cast(delta, gy_NO.dtype))
    return (
        grad_delta(gy_NO, h_NR, scaling, delta.dtype),
        grad_delta(g_NR, x_NC, scaling, mix.dtype),
    )


def _scaled_product(a: Tensor, b: Tensor, scaling: float, dtype: torch.dtype) -> Tensor:
    """Return scaling * a b in `dtype` by one GEMM, and a cast where no GEMM ends in that dtype."""
    if dtype.itemsize > a.itemsize and _can_widen(a.device, a.dtype, dtype):
        return _wide_product(a, b, scaling, dtype)
    return cast(a.mm(b) if scaling == 1.0 else _addmm(a, b, scaling), dtype)


def _addmm(a: Tensor, b: Tensor, scaling: float, **options: Any) -> Tensor:
    """Return scaling * a b; the tensor that addmm adds to is not read, and has one element."""
    nothing = a.new_empty(()).expand(a.shape[0], b.shape[1])
    return torch.addmm(nothing, a, b, beta=0, alpha=scaling, **options)


def _wide_product(a: Tensor, b: Tensor, scaling: float, dtype: torch.dtype) -> Tensor:
    """Return scaling * a b in a wider `dtype`, without rounding to that of a and b in between."""
    if scaling == 1.0:
        return torch.mm(a, b, out_dtype=dtype)
    return _addmm(a, b, scaling, out_dtype=dtype)


@functools.cache
def _can_widen(device: torch.device, dtype: torch.dtype, wide: torch.dtype) -> bool:
    """Whether `_wide_product` works there: torch 2.8 has it, for some devices and dtypes.

    Found out by trying it once, on tensors large enough for any alignment that a GEMM may ask for.
    """
    one = torch.ones(16, 16, device=device, dtype=dtype)
    try:
        return all(_wide_product(one, one, factor, wide).dtype == wide for factor in (1.0, 2.0))
    except (TypeError, RuntimeError) as error:  # no such option; no such kernel
        if is_out_of_memory(error):
            raise
        return False


def _is_on_cpu(x: Tensor) -> bool:
    return x.device.type == "cpu"  # torch 2.6 compiles no `is_cpu` in a backward pass


def _is_faster_transposed(gy_NO: Tensor, rank: int) -> bool:
    """Whether a CPU multiplies (N, O) with R columns faster as (B^T A^T)^T than as A B.

    It does if all of dy is read once for R rows instead of R columns, and these rows are long.
    """
    # A compiler would make a graph for few tokens, and one for many.
    return gy_NO.itemsize > 2 or torch.compiler.is_compiling() or gy_NO.shape[0] >= rank * 8


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return `x` in a dtype, itself where it is of that."""
    return x if x.dtype == dtype else x.to(dtype)
