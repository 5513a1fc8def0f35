"""A small network in float64, adapted; every test runs on the branches of a GPU, too."""

from collections.abc import Iterator
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn

from pacatune.residency import put
from tests.residency.devices import as_on_a_gpu
from tests.residency.net import Net, adapt

ON_CPUS_ALONE = {
    "test_a_weight_is_read_again_where_its_changes_may_go_unnoticed",  # by numpy
    # of the kernel itself, for which `as_on_a_gpu` stands in
    *("test_where_it_cannot_be_used", "test_a_kernel_that_fails_ends_no_run"),
    *("test_a_kernel_that_writes_other_values_is_not_used", "test_it_works"),
    *("test_a_lack_of_memory_is_no_fault_of_the_kernel", "test_bits_are_those_of_torch"),
    "test_a_grid_ends_at_no_number_of_blocks_or_layers",
    # in processes of their own
    *("test_its_bits_by_the_interpreter", "test_it_is_compiled_for_gpus_that_are_not_here"),
    "test_a_triton_that_launches_nothing_is_not_used",
}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run every test on the branches of a GPU as well."""
    devices = ["cpu"] if "launches" not in metafunc.fixturenames else []
    if metafunc.function.__name__ not in ON_CPUS_ALONE:
        devices.append("gpu")
    metafunc.parametrize("device", devices, indirect=True)


@pytest.fixture(name="device", autouse=True)
def _device(request: pytest.FixtureRequest) -> Iterator[str]:
    name = getattr(request, "param", "cpu")
    with as_on_a_gpu() if name == "gpu" else nullcontext() as request.node.launches:
        yield name


@pytest.fixture(name="launches")
def _launches(device: str, request: pytest.FixtureRequest) -> list[int]:
    """Grows by the number of weights of each launch."""
    return request.node.launches


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(name="base")
def _base() -> Net:
    torch.manual_seed(0)
    return Net().double()


@pytest.fixture(name="model")
def _model(base: Net) -> nn.Module:
    return adapt(base)


@pytest.fixture(name="x")
def _x() -> Tensor:
    return torch.randn(8, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.fixture(name="writes")
def _writes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one at each write of columns."""
    original = put.put_columns_
    done: list[int] = []

    def counting(memory: Tensor, *args: Tensor) -> None:
        done.append(memory.data_ptr())
        original(memory, *args)

    monkeypatch.setattr(put, "put_columns_", counting)
    return done
