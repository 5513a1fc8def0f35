"""What is promised of GPUs is held to on one; here, that a promise which is broken is found.

That they are kept on a CPU, as far as that goes, is shown by tests/tools/test_gpu_check.py.
"""

import itertools
from contextlib import nullcontext
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import torch

from benchmarks import gpu_promises as promises
from benchmarks import kernels
from pacatune import PacaModel
from pacatune.residency import put
from pacatune.residency import weight as residency

CHECKS = {
    name.removeprefix("check_"): check
    for name, check in vars(promises).items()
    if name.startswith("check_")
}
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),
    pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning"),
]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", CHECKS)
def test_kept_on_a_gpu(name):
    CHECKS[name](torch.device("cuda"))


def refused(name, message):
    with pytest.raises(promises.BrokenPromise, match=message):
        CHECKS[name](torch.device("cpu"))


@pytest.mark.skipif(find_spec("triton") is not None, reason="Triton is there")
def test_a_triton_that_is_not_there(tmp_path):
    flaw = promises.flaw_of_kernel(torch.device("cpu"), tmp_path)
    assert flaw == "ModuleNotFoundError: No module named 'triton'"


def test_bad_columns_that_are_trained(monkeypatch):
    monkeypatch.setattr(promises, "_BAD_COLUMNS", {"others": (0, 1, 2, 3)})
    refused("bad_columns", "columns that are others are not refused")


def test_a_tensor_on_the_default_device(monkeypatch):
    step, calls = promises._step, itertools.count()
    monkeypatch.setattr(promises, "_step", lambda *args: step(*args) + next(calls))
    refused("default_device", "with meta as the default device, losses are .* away")


def test_generation_that_is_additive(monkeypatch):
    monkeypatch.setattr(PacaModel, "_enable_peft_forward_hooks", lambda *a, **k: nullcontext())
    refused("generation", "`generate` between steps adds the columns' product")


def test_an_operator_that_a_cuda_graph_records(monkeypatch):
    monkeypatch.setattr(promises, "_PYTHON_OPERATORS", ["untagged"])
    untagged = SimpleNamespace(default=SimpleNamespace(tags=[]))
    monkeypatch.setattr(torch.ops.pacatune, "untagged", untagged, raising=False)
    refused("reduce_overhead", "CUDA graphs may record an operator that runs Python")


def test_wrong_gradients(monkeypatch):
    columns = put.adapted_columns
    monkeypatch.setattr(put, "adapted_columns", lambda w, d, scaling: columns(w, d, 1.01 * scaling))
    refused("gradients", r"float32: PaCA is .* from plain autograd, at most 1e-04")
    refused("columns", "columns in a weight have other bits")


def test_a_base_that_is_not_restored_and_shards_that_were_written(monkeypatch):
    """R2 and R6."""
    frozen, calls = promises._frozen, itertools.count()
    monkeypatch.setattr(promises, "_frozen", lambda model: [x + next(calls) for x in frozen(model)])
    refused("columns", "the base is not bit-identical after a look")
    monkeypatch.setattr(promises, "_frozen", lambda model: [p + 1 for p in model.parameters()])
    refused("fsdp2", "FSDP2: the base is not bit-identical")


def test_a_step_that_waits_for_the_device(monkeypatch):
    holds = residency.Residency.holds

    def holds_and_looks(self, update):
        float(update[0].detach().sum())
        return holds(self, update)

    monkeypatch.setattr(residency.Residency, "holds", holds_and_looks)
    refused("synchronisation", "a training step waits for the device in _local_scalar_dense")


def test_what_waits_for_a_device():
    for read in (lambda x: x[x > 0], torch.nonzero, torch.Tensor.item):
        with promises.Reads() as reads:
            read(torch.ones(1))
        assert reads.names
    x = torch.ones(3)
    with promises.Reads() as reads:
        x[torch.tensor([0, 2])] = x.index_select(0, torch.tensor([1, 1]))
        x.add_(x.sum()).to(torch.bfloat16)
    assert not reads.names


def test_more_launches_than_promised(monkeypatch):
    monkeypatch.setitem(kernels.PROMISED["eager"], "forward", 6)
    refused("kernels", r"paca, eager: 45 kernels \(forward\), at most 44 promised")


def test_kernels_of_a_layer_are_those_of_three_minus_those_of_two(monkeypatch):
    """Torch's profiler would tell of three kernels of a decoder layer in every phase."""
    make, made = kernels.make, []
    gpu, cpu = torch.autograd.DeviceType.CUDA, torch.autograd.DeviceType.CPU

    def averages():
        splits = ("void cublasLt::splitKreduce_kernel", 7 * made[-1], gpu)
        copies = ("Memcpy HtoD (Pinned -> Device)", 1, gpu)
        both = [("ampere_bf16_gemm", 3 * made[-1], gpu), copies, splits]
        both.append(("cudaLaunchKernel", 5, cpu))
        return [SimpleNamespace(key=key, count=n, device_type=kind) for key, n, kind in both]

    def make_and_tell(method, num_layers, device):
        made.append(num_layers)
        return make(method, num_layers, device)

    profiler = nullcontext(SimpleNamespace(key_averages=averages))
    monkeypatch.setattr(promises, "profile", lambda activities: profiler)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(kernels, "make", make_and_tell)
    found = kernels.count_layer("paca", count=promises._profiled)
    expected = {"forward": 3, "backward": 3, "with accumulation": 3, "optimizer in all": 9}
    assert {name: number for name, number in found.items() if number} == expected


@pytest.mark.parametrize("ratio", [0.9, 1.1])
def test_a_wrong_estimate(ratio):
    promises._hold_memory([{"method": "paca", "ratio": 1.02}])
    with pytest.raises(promises.BrokenPromise, match=rf"lora: the peak is {ratio}00 of the"):
        promises._hold_memory([{"method": "lora", "ratio": ratio}])
