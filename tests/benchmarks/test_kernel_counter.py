"""The counter of kernels: each rule by a few operators whose launches on a GPU are known."""

import contextlib

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from benchmarks.kernel_counter import KernelCounter, branches_of_gpu, num_of_multi_tensor
from pacatune.ops import products


def count(function):
    with KernelCounter() as counter:
        function()
    return counter.launches.total()


X = torch.ones(6, 8, dtype=torch.bfloat16)


@pytest.mark.parametrize(
    ("function", "number"),
    [
        (lambda: X.t().view(8, 6)[1:].unsqueeze(0).expand(3, 7, 6).detach(), 0),
        (lambda: torch.empty_like(torch.empty(3, 4)).new_empty(2), 0),
        (lambda: X.to(torch.bfloat16).contiguous(), 0),  # nothing moves
        (lambda: X[:0] * 2, 0),
        (lambda: torch.zeros(3), 1),
        (lambda: X.to(torch.float32), 1),
        (lambda: X.t().contiguous(), 1),
        (lambda: F.linear(X.view(2, 3, 8), X), 1),
        (lambda: F.linear(X, X, X[0, :6]), 1),
        (lambda: torch.addmm(X @ X.t(), X, X.t()), 3),  # one of them for the argument
        (lambda: torch.addmm(X[:, :6], X, X.t(), beta=0), 1),
        (lambda: X.clone().mul_(2).add_(X), 3),
        (lambda: torch.cat([X, X]), 1),
    ],
)
def test_launches(function, number):
    assert count(function) == number


def test_launches_of_multi_tensor_apply():
    """Chunks of 65,536 elements, 320 a launch; 110, 64, 48 or 36 tensors by the number of lists."""
    most = 320 * 65536
    sizes = ([], [0, 0], [1], [1] * 110, [1] * 111, [most], [most + 1])
    assert [num_of_multi_tensor(one, 1) for one in sizes] == [0, 0, 1, 1, 2, 1, 2]
    assert num_of_multi_tensor([65536] * 100, 2) == 2
    assert [num_of_multi_tensor([1] * number, 4) for number in (36, 224)] == [1, 7]
    parameters = [nn.Parameter(torch.ones(4)) for _ in range(40)]
    optimizer = torch.optim.AdamW(parameters, fused=True)
    for parameter in parameters:
        parameter.grad = torch.ones(4)
    optimizer.step()
    assert count(optimizer.step) == 1 + 2  # its counts of steps, and what is trained
    with torch.no_grad():
        assert count(lambda: torch._foreach_mul(parameters, 2.0)) == 1


def test_phases_and_fused_functions_that_call_another():
    counter = KernelCounter()
    inner = counter.as_one(lambda x: x + 1)
    with counter:
        counter.phase = "one"
        X + 1
        counter.phase = "two"
        X * 2 + 1
        with pytest.raises(AssertionError, match="a fused function calls another"):
            counter.as_one(inner)(X)
    assert counter.launches == {"one": 1, "two": 2}


@pytest.fixture(params=[contextlib.nullcontext, FakeTensorMode], ids=["real", "fake"])
def counter(request):
    """A counter with the branches of GPUs, on tensors with memory and without."""
    counter = KernelCounter()
    with request.param(), branches_of_gpu(counter), counter:
        yield counter


def empty(*shape, requires_grad=True):
    return torch.empty(*shape, dtype=torch.bfloat16, requires_grad=requires_grad)


def launched(counter, function):
    """Return how many kernels a function launches."""
    before = counter.launches.total()
    function()
    return counter.launches.total() - before


@pytest.mark.parametrize("is_causal", [True, False])
def test_attention_and_dropout_are_one_each_way(counter, is_causal):
    q, k, v = empty(2, 4, 32, 16), empty(2, 2, 32, 16), empty(2, 2, 32, 16)
    gradient, x = empty(2, 4, 32, 16, requires_grad=False), empty(8, 8)

    def attend():
        options = {"is_causal": is_causal, "enable_gqa": True}
        F.scaled_dot_product_attention(q, k, v, **options).backward(gradient)

    assert launched(counter, attend) == 2
    assert launched(counter, lambda: F.dropout(x, 0.5).backward(x.detach())) == 2


def test_branches_are_the_cpus_again_afterwards():
    before = products._is_on_cpu, F.scaled_dot_product_attention
    with branches_of_gpu(KernelCounter()):
        assert not products._is_on_cpu(X)
    assert (products._is_on_cpu, F.scaled_dot_product_attention) == before
