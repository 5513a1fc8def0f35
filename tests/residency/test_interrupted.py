"""Whatever interrupts a write or a restore, at whatever line, the base can be recovered."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pacatune import PacaConfig
from pacatune.residency import passes, put, together, weight
from pacatune.residency.watching import LOCK
from tests.residency.net import Net, adapt, assert_base, check, deltas, expected, layers

FILES = {module.__file__ for module in (passes, put, together, weight)}


@contextmanager
def at_line(number: int, act: Callable[[], None]) -> Iterator[list[int]]:
    """Act before the number-th line that the residency runs; yields how many lines it ran."""
    lines = [0]

    def trace(frame: FrameType, event: str, arg: Any) -> Any:
        if frame.f_code.co_filename not in FILES:
            return None
        if event == "line":
            lines[0] += 1
            if lines[0] == number:
                act()
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield lines
    finally:
        sys.settrace(before)
        # Python runs no signal handler between the end of a `with` block and its exit, but tells a
        # tracer of the line: an error that is raised there leaves the lock taken.
        while LOCK._is_owned():
            LOCK.release()


def train(model: nn.Module, x: Tensor) -> None:
    model(x).square().sum().backward()


def look(model: nn.Module, x: Tensor) -> None:
    list(model.parameters())


def step(model: nn.Module, x: Tensor) -> None:
    torch.optim.SGD(deltas(model), lr=0.1).step()


def switch(model: nn.Module, x: Tensor) -> None:
    model.set_adapter("other")
    train(model, x)


def merge(model: nn.Module, x: Tensor) -> None:
    model.merge_adapter()


def two_adapters(base: Net) -> nn.Module:
    """A model that is used again after each interruption, since making it takes most of a test."""
    model = adapt(base)
    model.add_adapter("other", PacaConfig(r=4, target_modules=["first", "second"], random_seed=7))
    return model


def prepare(model: nn.Module, x: Tensor) -> None:
    """Put the columns of the first adapter into the weights, with the same values each time."""
    model.set_adapter("default")
    with torch.no_grad():
        for delta in deltas(model):
            delta.normal_(generator=torch.Generator().manual_seed(delta.numel()))
    train(model, x)
    torch.optim.SGD(deltas(model), lr=0.0).step()  # from now on all weights are written together
    train(model, x)


@pytest.mark.parametrize(
    ("operation", "is_changed", "error"),
    [
        *((operation, True, KeyboardInterrupt) for operation in (train, look, step, switch, merge)),
        # An `Exception`; switching looks at weights, restores and writes.
        *((operation, True, torch.OutOfMemoryError) for operation in (train, switch)),
        # Other lines than where deltas have changed, which those of the others are not.
        (train, False, KeyboardInterrupt),
    ],
)
def test_an_exception_at_every_line(
    operation, is_changed: bool, error: type, base: Net, x: Tensor
) -> None:
    def fail() -> None:
        raise error

    model, number, has_ended = two_adapters(base), 0, False
    while not has_ended:
        number += 1
        prepare(model, x)
        if is_changed:
            with torch.no_grad():
                for delta in deltas(model):
                    delta.add_(0.1)
        with at_line(number, fail):
            try:
                operation(model, x)
                has_ended = True
            except error:
                pass
        if operation is merge:
            model.unmerge_adapter()
        assert_base(base, model)
        for adapter in ("default", "other"):
            model.set_adapter(adapter)
            check(base, model, x, adapter)
    assert number > 10


def test_a_look_at_every_line(base: Net, x: Tensor) -> None:
    """As a signal handler that saves the model does, in the middle of a write."""
    model, number, seen = two_adapters(base), 0, [[base.first.weight]]
    while seen:
        number += 1
        prepare(model, x)
        with torch.no_grad():
            for delta in deltas(model):
                delta.add_(0.1)
        seen.clear()

        def handler() -> None:
            seen.append([layer.base_layer.weight.detach().clone() for layer in layers(model)])

        with at_line(number, handler):
            check(base, model, x)
        for weights in seen:
            assert torch.equal(weights[0], base.first.weight)
            assert torch.equal(weights[1], base.second.weight)
        assert_base(base, model)
    assert number > 60


@pytest.mark.parametrize("operation", ["index_select", "add", "write"])
def test_out_of_memory_in_every_operation(
    operation: str, base: Net, x: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As `auto_find_batch_size` catches it, while another adapter's columns are copied aside."""
    model = two_adapters(base)
    prepare(model, x)
    model.set_adapter("other")
    owner = torch if operation == "add" else torch.Tensor
    if operation == "write":
        operation = "index_copy_"
    original = getattr(owner, operation)
    for fails_at in (1, 2):
        calls = 0

        def out_of_memory(*args: Any, _at: int = fails_at, **kwargs: Any) -> Tensor:
            nonlocal calls
            calls += 1
            if calls == _at:
                raise torch.OutOfMemoryError("out of memory")
            return original(*args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(owner, operation, out_of_memory)
            with pytest.raises(torch.OutOfMemoryError):
                train(model, x)
        check(base, model, x, "other")
        model.set_adapter("default")
        check(base, model, x)
        assert_base(base, model)
        model.set_adapter("other")


def test_a_write_of_another_scaling_that_fails_at_any_line(base: Net, x: Tensor) -> None:
    """The columns that a failed write has put in are nobody's, when all is as it was before."""

    def fail() -> None:
        raise KeyboardInterrupt

    model, number, has_ended = two_adapters(base), 0, False
    while not has_ended:
        number += 1
        prepare(model, x)
        scalings = [layer.scaling["default"] for layer in layers(model)]
        for layer in layers(model):
            layer.scaling["default"] *= 3
        with at_line(number, fail):
            try:
                train(model, x)
                has_ended = True
            except KeyboardInterrupt:
                pass
        for layer, scaling in zip(layers(model), scalings, strict=True):
            layer.scaling["default"] = scaling
        torch.testing.assert_close(model(x).detach(), expected(base, model, x)[0])
        check(base, model, x)
        assert_base(base, model)
    assert number > 10
