"""The hand-written gradients against plain autograd."""

from functools import partial

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode

from pacatune.ops import linear, paca_linear, paca_linear_additive, reference
from tests.ops import twin

SHAPES = [(), (5,), (2, 5), (2, 3, 4), (0,), (2, 0)]
FORMS = ["resident", "additive"]


def make(
    leading: tuple[int, ...],
    dtype: torch.dtype = torch.float64,
    bias: bool = True,
    out_features: int = 7,
    in_features: int = 11,
    rank: int = 3,
) -> dict[str, Tensor | None]:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    return {
        "x": normal(*leading, in_features),
        "weight": normal(out_features, in_features),
        "delta": normal(out_features, rank),
        "indices": torch.randperm(in_features, generator=generator)[:rank].sort().values,
        "bias": normal(out_features) if bias else None,
    }


def run(form: str, scaling: float, **tensors: Tensor | None) -> Tensor:
    if form == "reference":
        return reference.paca_linear(**tensors, scaling=scaling)
    if form == "additive":
        return paca_linear_additive(**tensors, scaling=scaling)
    weight = reference.adapted_weight(
        tensors["weight"], tensors["delta"].detach(), tensors["indices"], scaling
    )
    return paca_linear(**{**tensors, "weight": weight}, scaling=scaling)


def gradients(form: str, tensors: twin.Tensors, scaling: float, trained: set[str]) -> twin.Tensors:
    return twin.gradients(partial(run, form, scaling), tensors, trained)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("leading", SHAPES)
def test_gradcheck(form: str, leading: tuple[int, ...]) -> None:
    tensors = make(leading)
    if form == "resident":
        # The columns are read from the weight, so perturbing delta alone cannot be seen there:
        # what is checked for delta is the map from columns to outputs.
        def function(x: Tensor, delta: Tensor, bias: Tensor) -> Tensor:
            weight = reference.adapted_weight(
                tensors["weight"], delta.detach(), tensors["indices"], 0.5
            )
            return paca_linear(x, weight, delta, tensors["indices"], 0.5, bias)
    else:

        def function(x: Tensor, delta: Tensor, bias: Tensor) -> Tensor:
            return paca_linear_additive(x, tensors["weight"], delta, tensors["indices"], 0.5, bias)

    leaves = [tensors[name].requires_grad_() for name in ("x", "delta", "bias")]
    assert torch.autograd.gradcheck(function, leaves)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("leading", "bias", "dtype"),
    [
        *((leading, "trained", torch.float64) for leading in SHAPES),
        ((2, 5), "none", torch.float64),
        ((2, 5), "frozen", torch.float64),
        ((2, 5), "trained", torch.float32),
    ],
)
def test_equal_to_reference(
    form: str, leading: tuple[int, ...], bias: str, dtype: torch.dtype
) -> None:
    tensors = make(leading, dtype, bias != "none")
    for trained in twin.subsets(("x", "delta")):
        trained |= {"bias"} if bias == "trained" else set()
        found = (gradients(one, tensors, 0.75, trained) for one in (form, "reference"))
        twin.assert_equal(*found, 1e-12 if dtype == torch.float64 else 1e-5)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("num_tokens", [5, 6, 23, 24, 200])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_both_orders_of_thin_products(form: str, num_tokens: int, dtype: torch.dtype) -> None:
    """In 16 bits they are transposed where tokens are eight times as many as columns."""
    tensors, trained = make((num_tokens,), dtype), {"x", "delta"}
    expected = gradients("reference", tensors, 0.5, trained)
    actual = gradients(form, tensors, 0.5, trained)
    tolerance = {} if dtype == torch.float64 else {"rtol": 5e-2, "atol": 3e-1}
    for name in trained:
        torch.testing.assert_close(actual[name], expected[name], **tolerance)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("leading", SHAPES)
def test_without_columns(form: str, leading: tuple[int, ...]) -> None:
    """A process of a tensor parallel model may hold none of them."""
    trained = {"x", "delta"}
    tensors = make(leading, rank=0)
    twin.assert_equal(*(gradients(one, tensors, 0.7, trained) for one in (form, "reference")))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("delta_dtype", [torch.float32, None], ids=["delta32", "delta16"])
def test_low_precision_error_is_within_plain_autograds(
    form: str, dtype: torch.dtype, delta_dtype: torch.dtype | None
) -> None:
    tensors = make((64,), dtype, out_features=48, in_features=96, rank=8)
    tensors["delta"] = (tensors["delta"] * 0.01).to(delta_dtype or dtype)
    both = (partial(run, one, 2.0) for one in (form, "reference"))
    twin.assert_error_of_plain(*both, tensors, {"x", "delta", "bias"})


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("delta_dtype", [torch.float32, torch.bfloat16])
def test_autocast_as_reference(form: str, delta_dtype: torch.dtype) -> None:
    tensors = make((2, 5), torch.float32)
    tensors["delta"] = tensors["delta"].to(delta_dtype)
    results = []
    for which in (form, "reference"):
        with torch.autocast("cpu", torch.bfloat16):
            results.append(gradients(which, tensors, 1.0, {"x", "delta", "bias"}))
    twin.assert_equal(*results, 0.1)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_saved_bytes_are_tokens_times_rank(form: str, dtype: torch.dtype) -> None:
    leaves = {k: v.requires_grad_(k in ("x", "delta")) for k, v in make((2, 5), dtype).items()}
    function = paca_linear if form == "resident" else paca_linear_additive
    kept = twin.bytes_kept(lambda: function(**leaves, scaling=2.0), leaves.values())
    assert kept == 2 * 5 * 3 * dtype.itemsize


def test_nothing_is_saved_for_a_gradient_nobody_needs() -> None:
    tensors = make((5,))
    kept = []
    tensors["x"].requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        paca_linear(**tensors, scaling=1.0)
    assert all(t.shape != (5, 3) for t in kept)  # delta is frozen: x[:, indices] is not kept


# Dynamo itself instantiates autograd Functions while it traces them.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("form", FORMS)
def test_compiles_whole_and_once(form: str) -> None:
    tensors = make((4, 5), torch.float32)
    counter = CompileCounterWithBackend("aot_eager")
    function = paca_linear if form == "resident" else paca_linear_additive
    compiled = torch.compile(function, fullgraph=True, backend=counter)
    for step in range(4):
        tensors["weight"].mul_(1.0 + step)
        calls = (partial(one, scaling=0.5) for one in (compiled, function))
        twin.assert_equal(*(twin.gradients(c, tensors, {"x", "delta", "bias"}) for c in calls))
    assert counter.frame_count == 1


def test_second_derivative_is_refused() -> None:
    tensors = make((5,))
    tensors["x"].requires_grad_()
    y = paca_linear(**tensors, scaling=1.0)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(y.sum(), tensors["x"], create_graph=True)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("leading", SHAPES)
@pytest.mark.parametrize("form", FORMS)
def test_the_output_may_be_changed_in_place(
    form: str, leading: tuple[int, ...], bias: bool
) -> None:
    """As that of a linear layer: many models add to it, or scale a transposed view of it."""
    found = []
    for which in (form, "reference"):
        tensors = make(leading, bias=bias)
        tensors["delta"].requires_grad_()
        y = run(which, 0.5, **tensors)
        y += 1
        view = y.transpose(0, -1)
        view *= 3
        found.append(torch.autograd.grad(y.square().sum(), tensors["delta"]))
    torch.testing.assert_close(*found)


def test_changing_delta_in_place_before_backward_is_refused() -> None:
    tensors = make((5,))
    tensors["delta"].requires_grad_()
    y = paca_linear(**tensors, scaling=1.0)
    with torch.no_grad():
        tensors["delta"].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("weight", torch.zeros(7), r"`weight` must be \(O, I\), got shape \(7,\)"),
        ("x", torch.zeros(5, 10), r"`x` must be \(\.\.\., I=11\).* got shape \(5, 10\)"),
        ("x", torch.tensor(1.0), r"`x` must be \(\.\.\., I=11\)"),
        ("delta", torch.zeros(7, 4), r"`delta` must be \(O=7, R=3\).* got shape \(7, 4\)"),
        ("indices", torch.zeros(3), r"`indices` must be \(R,\) int64, got .* torch.float32"),
        ("bias", torch.zeros(6), r"`bias` must be \(O=7,\), got shape \(6,\)"),
    ],
)
@pytest.mark.parametrize("function", [paca_linear, paca_linear_additive])
def test_wrong_shapes(function, name: str, value: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        function(**{**make((5,), torch.float32), name: value}, scaling=1.0)


def _widened(a: Tensor, b: Tensor, scaling: float, dtype: torch.dtype) -> Tensor:
    """What a GPU's GEMM with a wider output computes."""
    return scaling * a.to(dtype).mm(b.to(dtype))


@pytest.fixture(params=[True, False], ids=["widens", "casts"])
def gpu_branch(request, monkeypatch):
    """Run what GPUs run, with the GEMM that widens and without (torch before 2.8)."""
    monkeypatch.setattr(linear, "_is_on_cpu", lambda x: False)
    monkeypatch.setattr(linear, "_can_widen", lambda device, dtype, wide: request.param)
    monkeypatch.setattr(linear, "_wide_product", _widened)
    return request.param


@pytest.mark.parametrize(
    ("dtype", "delta_dtype", "leading", "scaling"),
    [
        (torch.float32, torch.float32, (5,), 0.75),
        (torch.bfloat16, torch.float32, (2, 200), 0.75),
        (torch.bfloat16, torch.float32, (0,), 1.0),
        (torch.bfloat16, torch.bfloat16, (5,), 1.0),
        (torch.float32, torch.bfloat16, (2, 200), 0.75),
    ],
)
def test_gradient_of_delta_by_the_branch_of_gpus(
    gpu_branch, scaling, leading, delta_dtype, dtype
) -> None:
    tensors = make(leading, dtype, out_features=48, in_features=96, rank=8)
    tensors["delta"] = tensors["delta"].to(delta_dtype)
    ours = gradients("resident", tensors, scaling, {"x", "delta", "bias"})
    assert ours["delta"].dtype == delta_dtype
    assert ours["delta"].is_contiguous()
    exact = {k: v if k == "indices" else v.double() for k, v in tensors.items()}
    truth = gradients("reference", exact, scaling, {"x", "delta", "bias"})["delta"]
    # Rounded once to 16 bits, or not at all; the sums in float32.
    rounds = torch.bfloat16 in (dtype, delta_dtype)
    largest = truth.abs().max()
    assert (ours["delta"].double() - truth).abs().max() <= largest * (2**-8 if rounds else 1e-5)


def test_a_gemm_that_widens_does_not_round_to_16_bits(gpu_branch) -> None:
    generator = torch.Generator().manual_seed(0)
    gy, x = (torch.randn(64, n, generator=generator).to(torch.bfloat16) for n in (48, 8))
    found = linear.grad_delta(gy, x, 2.0, torch.float32)
    exact = 2.0 * gy.double().t().mm(x.double())
    error = (found.double() - exact).abs().max() / exact.abs().max()
    assert (error < 1e-6) == gpu_branch


def test_what_addmm_adds_to_is_never_read() -> None:
    a, b = torch.randn(6, 4), torch.randn(4, 3)
    torch.use_deterministic_algorithms(True)  # fills what is not set with NaN
    try:
        torch.testing.assert_close(linear._addmm(a, b, 2.0), 2.0 * a.mm(b))
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.skipif("dtype" not in torch.ops.aten.addmm.overloads(), reason="torch before 2.8")
@pytest.mark.parametrize("scaling", [1.0, 2.0])
def test_torch_has_the_gemm_that_widens(scaling) -> None:
    """On tensors without memory, since CPUs have no kernel for it."""
    with FakeTensorMode():
        gy, x = torch.empty(5, 7, dtype=torch.bfloat16), torch.empty(5, 3, dtype=torch.bfloat16)
        found = linear._wide_product(gy.t(), x, scaling, torch.float32)
    assert (found.shape, found.dtype) == ((7, 3), torch.float32)


def test_no_gemm_that_widens_is_found_on_a_cpu() -> None:
    assert not linear._can_widen(torch.device("cpu"), torch.bfloat16, torch.float32)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("scaling", [1.0, 2.0])
def test_gradient_of_delta_is_one_kernel_on_a_gpu(scaling) -> None:
    gy, x = (torch.randn(256, n, device="cuda").to(torch.bfloat16) for n in (512, 16))
    linear.grad_delta(gy, x, scaling, torch.float32)  # finds out what torch has
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        found = linear.grad_delta(gy, x, scaling, torch.float32)
    exact = scaling * gy.double().t().mm(x.double())
    assert (found.double() - exact).abs().max() < 1e-5 * exact.abs().max()
    assert sum(event.count for event in profile.key_averages()) <= 2  # split-K adds up its parts
