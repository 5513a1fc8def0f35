"""R4: at most two column writes per layer and optimiser step, none per micro-batch."""

import pytest
import torch
from torch import Tensor

from tests.residency.net import Net, adapt, check, deltas, expected, layers


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
        for _ in range(5):
            writes.clear()
            for _ in range(accumulation):
                model(x.clone().requires_grad_()).sum().backward()
            optimizer.step()
            assert len(writes) == len(layers(model))

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

    def test_evaluation_writes_once(self, base: Net, x: Tensor, writes: list[int]) -> None:
        model = adapt(base).eval()
        with torch.no_grad():
            for _ in range(10):
                model(x)
        assert len(writes) == len(layers(model))

    def test_inference_mode(self, base: Net, x: Tensor) -> None:
        model = adapt(base)
        with torch.inference_mode():
            y = model(x)
        torch.testing.assert_close(y, expected(base, model, x)[0])
        check(base, model, x)
