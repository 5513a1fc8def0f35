"""R2: whatever interrupts a write or a restore, at whatever line, the base can be recovered."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pacatune.residency import passes, put, together, weight
from pacatune.residency.watching import LOCK
from tests.residency import net

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


@pytest.fixture(name="model")
def _model(model: nn.Module) -> nn.Module:
    """Used again after each interruption, since making it takes most of a test."""
    net.add_other(model)
    return model


def prepare(model: nn.Module, x: Tensor) -> None:
    """Put the columns of the first adapter into the weights, with the same values each time."""
    model.set_adapter("default")
    with torch.no_grad():
        for delta in net.deltas(model):
            delta.normal_(generator=torch.Generator().manual_seed(delta.numel()))
    train(model, x)
    step(model, x, lr=0.0)  # from now on all weights are written together
    train(model, x)


def train(model: nn.Module, x: Tensor) -> None:
    model(x).square().sum().backward()


def look(model: nn.Module, x: Tensor) -> None:
    list(model.parameters())


def step(model: nn.Module, x: Tensor, lr: float = 0.1) -> None:
    torch.optim.SGD(net.deltas(model), lr=lr).step()


def switch(model: nn.Module, x: Tensor) -> None:
    model.set_adapter("other")
    train(model, x)


def merge(model: nn.Module, x: Tensor) -> None:
    model.merge_adapter()


def leave(model: nn.Module) -> None:
    """Change nothing."""


def scale(model: nn.Module, factor: float = 2.0) -> None:
    for layer in net.layers(model):
        layer.scaling["default"] *= factor


@pytest.mark.parametrize(
    ("change", "operation", "error"),
    [
        *(
            (net.move, operation, KeyboardInterrupt)
            for operation in (train, look, step, switch, merge)
        ),
        (net.move, switch, torch.OutOfMemoryError),  # an `Exception`
        (leave, train, KeyboardInterrupt),  # other lines than where deltas have changed
        (scale, train, KeyboardInterrupt),
    ],
)
def test_an_exception_at_every_line(change, operation, error, base, model, x):
    def fail() -> None:
        raise error

    number, has_ended = 0, False
    while not has_ended:
        number += 1
        prepare(model, x)
        change(model)
        with at_line(number, fail), suppress(error):
            operation(model, x)
            has_ended = True
        if change is scale:  # columns of the failed write are nobody's, when all is as it was
            scale(model, 0.5)
            net.assert_close(model(x).detach(), net.expected(base, model, x)[0])
        if operation is merge:
            model.unmerge_adapter()
        net.assert_base(base, model)
        for adapter in ("default", "other"):
            model.set_adapter(adapter)
            net.check(base, model, x, adapter)
    assert number > 10


def test_a_look_at_every_line(base, model, x):
    """As a signal handler that saves the model does, in the middle of a write."""
    number, looks = 0, [1]
    while looks:
        number += 1
        prepare(model, x)
        net.move(model)
        looks.clear()

        def handler() -> None:
            looks.append(1)
            net.assert_base(base, model)

        with at_line(number, handler):
            net.check(base, model, x)
        net.assert_base(base, model)
    assert number > 60
