"""What GPUs run in one kernel is what is written: compiled here for the CPU, by force."""

import functools

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode

from pacatune.lean import fused
from pacatune.lean.gated import ACTIVATIONS
from tests.lean.functions import CASES, run
from tests.ops.twin import assert_within_own_error, cast

PRODUCT, NORM = (CASES[name].function for name in ("product, silu", "rms_norm, llama"))
# Inductor imports what torch itself deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")


@pytest.fixture
def compiled(monkeypatch):
    """Compile wherever a GPU would."""
    torch.compiler.reset()
    fused._compiled.cache_clear()
    monkeypatch.setattr(fused, "_is_wanted", lambda x: type(x) is torch.Tensor)
    yield
    fused._compiled.cache_clear()
    torch.compiler.reset()


@pytest.fixture
def graphs(compiled, monkeypatch):
    """Count the graphs without making kernels of them, which takes seconds each."""
    counter = CompileCounterWithBackend("aot_eager")
    compile_ = functools.partial(torch.compile, dynamic=True, backend=counter, fullgraph=True)
    monkeypatch.setattr(fused, "_compiled", functools.cache(compile_))
    return counter


def test_a_kernel_computes_what_is_written(compiled, monkeypatch):
    case = CASES["product, silu"]
    tensors = cast(case.tensors, torch.bfloat16)
    ours, saved = run(case.function, tensors, case.floating)
    assert not fused._failed
    monkeypatch.setattr(fused, "_is_wanted", lambda x: False)
    theirs, saved_apart = run(case.function, tensors, case.floating)
    exact, _ = run(case.function, cast(tensors, torch.float64), case.floating)
    assert saved == saved_apart
    assert_within_own_error(ours, theirs, exact)


def test_cpus_and_tensors_without_memory_compile_nothing(monkeypatch):
    monkeypatch.setattr(fused, "_compiled", lambda function: pytest.fail("compiled"))
    monkeypatch.setattr(fused, "_has_triton", lambda: True)
    gate, up = torch.randn(2, 3, 32)
    run(PRODUCT, {"gate": gate, "up": up}, {"gate", "up"})
    with FakeTensorMode():
        assert not fused._is_wanted(torch.empty(3, device="cuda"))


def test_what_cannot_be_compiled_runs_as_it_is(monkeypatch):
    def refuse(*args):
        raise RuntimeError("no compiler\nand a long trace")

    @fused.fused
    def double(x):
        return 2 * x

    monkeypatch.setattr(fused, "_is_wanted", lambda x: True)
    monkeypatch.setattr(fused, "_compiled", lambda function: refuse)
    message = r"`double` could not be compiled \(RuntimeError: no compiler\); lean activations run"
    with pytest.warns(UserWarning, match=message):
        assert double(torch.ones(2)).tolist() == [2.0, 2.0]
    assert double(torch.ones(2)).tolist() == [2.0, 2.0]  # and says no more


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), MemoryError()])
def test_a_lack_of_memory_is_not_taken_for_a_lack_of_a_compiler(monkeypatch, error):
    """A smaller batch may fit, and is run by the kernel."""

    def kernel(x):
        if len(x) > 2:
            raise error
        return 2 * x + 1

    monkeypatch.setattr(fused, "_is_wanted", lambda x: True)
    monkeypatch.setattr(fused, "_compiled", lambda function: kernel)
    double = fused.fused(lambda x: 2 * x)
    with pytest.raises(type(error)):
        double(torch.ones(3))
    assert double(torch.ones(2)).tolist() == [3.0, 3.0]


def test_shapes_of_all_kinds_share_one_graph_each_way(graphs):
    """Torch keeps 8 graphs of a function, and then runs it as it is, without a word."""
    indices = torch.tensor([1, 4, 9])
    for shape in ((5, 32), (2, 6, 32), (1, 9, 32), (3, 1, 4, 32), (2, 1, 32)):
        x, other, weight = torch.randn(shape), torch.randn(shape), torch.randn(32)
        run(NORM, {"x": x, "weight": weight}, {"x", "weight"})
        run(PRODUCT, {"gate": x, "up": other}, {"gate", "up"})
        found = ACTIVATIONS["silu"].product_columns(x, other, indices)
        expected = torch.nn.functional.silu(x) * other
        torch.testing.assert_close(found, expected[..., indices])
    assert graphs.frame_count == 5  # a norm, a product, and each backward; the columns
