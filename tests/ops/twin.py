"""Ours beside the reference: outputs, gradients, the error of 16 bits, bytes that are kept."""

import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from pacatune.ops.columns import Update

Tensors = dict[str, Tensor | None]


def by_parts(function):
    """Return a function of ops that takes delta, indices and scaling one by one, as twins do."""

    def call(*args, delta, indices, scaling, **options):
        return function(*args, update=Update(delta, indices, scaling), **options)

    return call


def normal(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    """Return the same random numbers, rounded to a dtype."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def choose(columns: int, rank: int) -> Tensor:
    """Return some columns, sorted."""
    generator = torch.Generator().manual_seed(0)
    return torch.randperm(columns, generator=generator)[:rank].sort().values


def leaves_of(tensors: Tensors, trained: set[str]) -> Tensors:
    """Return copies, of which some ask for gradients."""
    return {
        name: x.detach().clone().requires_grad_(name in trained)
        if x is not None and x.is_floating_point()
        else x
        for name, x in tensors.items()
    }


def cast(tensors: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """Return floating tensors in another dtype, and everything else as it is."""
    return {
        name: x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x
        for name, x in tensors.items()
    }


def gradients(function: Callable[..., Tensor], tensors: Tensors, trained: set[str]) -> Tensors:
    """Return the output `y` and the gradient of each tensor, None of frozen ones."""
    leaves = leaves_of(tensors, trained)
    y = function(**leaves)
    if y.requires_grad:
        y.backward(normal(*y.shape, dtype=y.dtype, seed=1))
    found = {name: x.grad for name, x in leaves.items() if x is not None and x.is_floating_point()}
    return {"y": y.detach(), **found}


def subsets(names: Iterable[str]) -> Iterator[set[str]]:
    """Yield all sets of trained tensors."""
    names = tuple(names)
    for flags in itertools.product([True, False], repeat=len(names)):
        yield set(itertools.compress(names, flags))


def assert_equal(
    ours: Tensors, theirs: Tensors, atol: float | None = None, rtol: float | None = None
) -> None:
    """Hold outputs and gradients against each other, their dtypes too; `rtol` is as `atol`."""
    assert ours.keys() == theirs.keys()
    rtol = atol if rtol is None else rtol
    for name, expected in theirs.items():
        if expected is None:
            assert ours[name] is None, name
        else:
            torch.testing.assert_close(ours[name], expected, atol=atol, rtol=rtol)


def assert_within_own_error(
    ours: Tensors, plain: Tensors, exact: Tensors, factor: float = 1.5, units: float = 1
) -> None:
    """Compare errors against float64: ours may be that of plain autograd times a factor.

    Beside that a few units of the last place, since either may be exact by chance.
    """
    assert ours.keys() == plain.keys() == exact.keys()
    for name, truth in exact.items():
        if truth is None:
            continue
        assert ours[name].dtype == plain[name].dtype, name
        error, budget = ((found[name].double() - truth).norm() for found in (ours, plain))
        rounding = units * torch.finfo(ours[name].dtype).eps * truth.norm()
        assert error <= factor * budget + rounding + 1e-6, f"{name}: {error} > {budget}"


def assert_error_of_plain(
    function: Callable[..., Tensor],
    reference: Callable[..., Tensor],
    tensors: Tensors,
    trained: set[str],
    factor: float = 1.5,
) -> None:
    """Hold the error against float64 to that of plain autograd in the same dtype."""
    wide = cast(tensors, torch.float64)
    exact, plain = (gradients(reference, given, trained) for given in (wide, tensors))
    assert_within_own_error(gradients(function, tensors, trained), plain, exact, factor, units=0)


def bytes_kept(call: Callable[[], object], given: Iterable[Tensor | None]) -> int:
    """Return the bytes that a call keeps for backward, of memory that is not given."""
    known = {x.untyped_storage().data_ptr() for x in given if x is not None}
    kept: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        call()
    return sum(size for pointer, size in kept.items() if pointer not in known)


@pytest.fixture
def filled_with_nan() -> Iterator[None]:
    """New memory holds NaN, so that nobody can rely on zeros that are there by chance."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
