"""On a GPU: `pytest -m gpu`. `pytest tests/gpu --device cpu` rehearses what needs none."""

import gc

import pytest
import torch


def pytest_addoption(parser):
    parser.addoption("--device", default="cuda", choices=["cuda", "cpu"], help="cpu: rehearse")


def device_of(config):
    return torch.device(config.getoption("--device", "cuda"))


class Skipped(pytest.Module):
    """A file that is not even imported."""

    def collect(self):
        pytest.skip("no CUDA device; `--device cpu` rehearses", allow_module_level=True)


def pytest_pycollect_makemodule(module_path, parent):
    if device_of(parent.config).type == "cuda" and not torch.cuda.is_available():
        return Skipped.from_parent(parent, path=module_path)
    return None


@pytest.fixture(scope="session")
def device(request):
    return device_of(request.config)


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
