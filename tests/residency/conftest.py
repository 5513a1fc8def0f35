"""Everything is float64 unless dtype is the point: float32 may take the additive form."""

import pytest
import torch
from torch import Tensor

import pacatune.residency.put
from tests.residency.net import Net


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(name="base")
def _base() -> Net:
    torch.manual_seed(0)
    return Net().double()


@pytest.fixture(name="x")
def _x() -> Tensor:
    return torch.randn(8, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.fixture(name="writes")
def _writes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one at each write of columns."""
    original = pacatune.residency.put._put_columns_
    done: list[int] = []

    def counting(memory: Tensor, *args: Tensor) -> None:
        done.append(memory.data_ptr())
        original(memory, *args)

    monkeypatch.setattr(pacatune.residency.put, "_put_columns_", counting)
    return done
