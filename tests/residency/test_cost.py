"""R4: at most two column writes per layer and optimiser step, none per micro-batch."""

import sys
from collections.abc import Callable
from types import FrameType

import pytest
import torch
from torch import Tensor

from pacatune.residency import resident
from tests.residency.net import Net, adapt, assert_base, check, deltas, expected, layers


class TestR4Cost:
    """At most two column writes per layer and optimiser step, none per micro-batch."""

    @pytest.mark.parametrize("accumulation", [1, 3, 4])
    @pytest.mark.parametrize("checkpointing", [None, "reentrant", "non-reentrant"])
    def test_one_write_per_step_if_nobody_holds_the_weight(
        self, accumulation: int, checkpointing: str | None, base: Net, x: Tensor, writes: list[int]
    ) -> None:
        model = adapt(base)
        model.base_model.model.checkpointing = checkpointing
        optimizer = torch.optim.AdamW(deltas(model), lr=0.1, fused=True)
        for step in range(5):
            writes.clear()
            for _ in range(accumulation):
                model(x.clone().requires_grad_()).sum().backward()
            optimizer.step()
            # Reentrant checkpointing evaluates first, which takes out what is no longer right.
            assert len(writes) == (2 if checkpointing == "reentrant" and step else 1) * 2

    def test_two_writes_per_step_if_somebody_does(
        self, base: Net, x: Tensor, writes: list[int]
    ) -> None:
        model = adapt(base)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(5):
            writes.clear()
            for _ in range(3):
                model(x).sum().backward()
            optimizer.step()
            assert len(writes) == 2 * len(layers(model))

    def test_evaluation_never_writes(self, base: Net, x: Tensor, writes: list[int]) -> None:
        model = adapt(base)
        y = expected(base, model, x)[0]
        with torch.no_grad():
            for _ in range(10):
                torch.testing.assert_close(model(x), y)
        assert not writes

    def test_evaluation_uses_what_training_has_written(
        self, base: Net, x: Tensor, writes: list[int]
    ) -> None:
        model = adapt(base)
        y = model(x)
        writes.clear()
        with torch.no_grad():
            assert torch.equal(model(x), y)
        assert not writes

    def test_evaluation_writes_once_if_told_to(
        self, base: Net, x: Tensor, writes: list[int]
    ) -> None:
        model = adapt(base)
        y = expected(base, model, x)[0]
        with resident(model), torch.no_grad():
            for _ in range(10):
                torch.testing.assert_close(model(x), y)
            assert len(writes) == len(layers(model))
            assert all(layer.residency.is_written for layer in layers(model))
        assert_base(base, model)

    def test_inference_mode(self, base: Net, x: Tensor) -> None:
        model = adapt(base)
        with torch.inference_mode():
            y = model(x)
        torch.testing.assert_close(y, expected(base, model, x)[0])
        check(base, model, x)

    def test_a_layer_costs_few_python_frames(self) -> None:
        model = adapt(Net())
        x = torch.randn(8, 10, requires_grad=True)
        model(x).sum().backward()  # writes
        layer, done = layers(model)[0], []
        forward = frames_from("_wrapped_call_impl", lambda: done.append(layer(x)))
        backward = frames_from("apply", done[0].sum().backward)
        assert 10 < len(forward) <= 29, forward
        assert 5 < len(backward) <= 13, backward


def frames_from(first: str, function: Callable[[], None]) -> list[str]:
    """Return the Python functions that run in a call, from one on."""
    names: list[str] = []

    def note(frame: FrameType, event: str, argument: object) -> None:
        if event == "call" and (names or frame.f_code.co_name == first):
            names.append(frame.f_code.co_name)

    before = sys.getprofile()
    sys.setprofile(note)
    try:
        function()
    finally:
        sys.setprofile(before)
    return names
