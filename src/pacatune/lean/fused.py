"""Elementwise work as one kernel on GPUs, made by torch.compile out of the functions as they stand.

Eager PyTorch reads and writes memory once per operation, so that what a lean module computes again
would cost time on a GPU. torch.compile needs Triton there; without it, and on CPUs, the functions
run as they are. A fused kernel rounds to 16 bits once where the operations apart round each.
"""

import functools
import importlib.util
import warnings
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from pacatune.precision import is_out_of_memory

_Function = TypeVar("_Function", bound=Callable[..., Any])


def fused(function: _Function) -> _Function:
    """Return `function`, as one kernel where its first argument is on a GPU with Triton.

    Where it cannot be compiled, it says so once and runs as it is from then on. What is compiled
    sees tensors as matrices: a graph is of one number of dimensions, and torch keeps but 8 of each
    function.

    Args:
        function: Takes tensors and hashable settings, and treats each row of (..., I) alike; has no
            side effects, but on matrices. Its tensors of several dimensions have those of the
            first, but the last.
    """

    @functools.wraps(function)
    def run(x: Tensor, *args: Any) -> Any:
        if not _is_wanted(x) or function in _failed:
            return function(x, *args)
        try:
            return _of_matrices(_compiled(function), x, *args)
        except Exception as error:
            if is_out_of_memory(error):
                raise
            result = function(x, *args)  # raises what is the arguments' fault
            _failed.add(function)
            warnings.warn(
                f"`{function.__name__}` could not be compiled ({type(error).__name__}: "
                f"{str(error).partition(chr(10))[0]}); lean activations run without fused kernels.",
                stacklevel=2,
            )
            return result

    return cast(_Function, run)


def _of_matrices(function: Callable[..., Any], *args: Any) -> Any:
    """Return function(*args) of tensors with their leading dimensions made one."""
    leading = args[0].shape[:-1]
    if len(leading) == 1:
        return function(*args)
    results = function(*(x.reshape(-1, x.shape[-1]) if _has_rows(x) else x for x in args))
    if isinstance(results, Tensor):
        return results.view(*leading, results.shape[-1])
    return tuple(y.view(*leading, y.shape[-1]) if _has_rows(y) else y for y in results)


def _has_rows(x: Any) -> bool:
    return isinstance(x, Tensor) and x.dim() > 1


_failed: set[Any] = set()


def _is_wanted(x: Tensor) -> bool:
    # Subclasses, such as tensors without memory, have ways of their own.
    return x.is_cuda and type(x) is Tensor and _has_triton()


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


@functools.cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function, dynamic=True)
