"""On a GPU: `pytest -m gpu`. `pytest tests/gpu --device cpu` rehearses what needs none."""

import gc

import pytest
import torch


def pytest_addoption(parser):
    parser.addoption("--device", default="cuda", choices=["cuda", "cpu"], help="cpu: rehearse")


@pytest.fixture(scope="session")
def device(request):
    name = request.config.getoption("--device", "cuda")
    if name == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device; `pytest tests/gpu --device cpu` rehearses")
    return torch.device(name)


@pytest.fixture
def cuda(device):
    if device.type != "cuda":
        pytest.skip("needs a CUDA device")
    return device


@pytest.fixture(autouse=True)
def _give_back(device):
    yield
    torch.compiler.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
