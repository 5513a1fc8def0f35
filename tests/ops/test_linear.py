"""The hand-written gradients against plain autograd."""

from functools import partial

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode

from pacatune.ops import paca_linear, paca_linear_additive, products
from pacatune.ops.columns import adapted_columns
from tests.ops import reference, twin
from tests.ops.twin import choose, filled_with_nan, normal  # noqa: F401  (a fixture)

SHAPES = [(), (5,), (2, 5), (2, 3, 4), (0,), (2, 0)]
FORMS = {
    "resident": twin.by_parts(paca_linear),
    "additive": twin.by_parts(paca_linear_additive),
}
ALL = {"x", "delta", "bias"}
OUT, IN, RANK = SIZES = 12, 11, 4
LARGE = 48, 96, 8
every_form = pytest.mark.parametrize("form", FORMS)


def make(leading, sizes=SIZES, dtype=torch.float64, bias=True) -> dict[str, Tensor | None]:
    out_features, in_features, rank = sizes
    return {
        "x": normal(*leading, in_features, dtype=dtype, seed=4),
        "weight": normal(out_features, in_features, dtype=dtype, seed=1),
        "delta": normal(out_features, rank, dtype=dtype, seed=2),
        "indices": choose(in_features, rank),
        "bias": normal(out_features, dtype=dtype, seed=3) if bias else None,
    }


def run(form: str, scaling: float, **tensors: Tensor | None) -> Tensor:
    if form == "reference":
        return reference.paca_linear(**tensors, scaling=scaling)
    if form == "resident":  # its columns are in the weight
        update = tensors["delta"].detach(), tensors["indices"], scaling
        tensors["weight"] = reference.adapted_weight(tensors["weight"], *update)
    return FORMS[form](**tensors, scaling=scaling)


def gradients(form: str, tensors: twin.Tensors, scaling: float, trained: set[str]) -> twin.Tensors:
    return twin.gradients(partial(run, form, scaling), tensors, trained)


@every_form
@pytest.mark.parametrize("leading", SHAPES)
def test_gradcheck(form, leading) -> None:
    tensors = make(leading)
    leaves = [tensors[name].requires_grad_() for name in ("x", "delta", "bias")]

    def function(x: Tensor, delta: Tensor, bias: Tensor) -> Tensor:
        return run(form, 0.5, **{**tensors, "x": x, "delta": delta, "bias": bias})

    assert torch.autograd.gradcheck(function, leaves)


@every_form
@pytest.mark.parametrize(
    ("leading", "bias", "dtype"),
    [
        *((leading, True, torch.float64) for leading in SHAPES),
        ((2, 5), False, torch.float64),
        ((2, 5), True, torch.float32),
    ],
)
def test_equal_to_reference(form, leading, bias, dtype) -> None:
    tensors = make(leading, dtype=dtype, bias=bias)
    for trained in twin.subsets(ALL if bias else ALL - {"bias"}):
        found = (gradients(one, tensors, 0.75, trained) for one in (form, "reference"))
        twin.assert_equal(*found, 1e-12 if dtype == torch.float64 else 1e-5)


@every_form
@pytest.mark.parametrize("num_tokens", [7, 8, 31, 32, 200])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_both_orders_of_thin_products(form, num_tokens, dtype) -> None:
    """In 16 bits they are transposed where tokens are eight times as many as columns."""
    tensors, trained = make((num_tokens,), dtype=dtype), {"x", "delta"}
    expected = gradients("reference", tensors, 0.5, trained)
    actual = gradients(form, tensors, 0.5, trained)
    tolerance = {} if dtype == torch.float64 else {"rtol": 5e-2, "atol": 3e-1}
    for name in trained:
        torch.testing.assert_close(actual[name], expected[name], **tolerance)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("delta_dtype", [torch.float32, None], ids=["delta32", "delta16"])
def test_adapted_columns_are_rounded_once(dtype, delta_dtype) -> None:
    """Of a sum of more bits: whoever makes W' has these, so no other test would see it."""
    columns, delta = (normal(64, 32, dtype=dtype, seed=seed) for seed in (0, 1))
    want = (columns.double() + 0.75 * delta.double()).to(dtype)
    assert torch.equal(adapted_columns(columns, delta.to(delta_dtype or dtype), 0.75), want)


@every_form
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("delta_dtype", [torch.float32, None], ids=["delta32", "delta16"])
def test_low_precision_error_is_within_plain_autograds(form, dtype, delta_dtype) -> None:
    tensors = make((64,), LARGE, dtype)
    tensors["delta"] = (tensors["delta"] * 0.01).to(delta_dtype or dtype)
    both = (partial(run, one, 2.0) for one in (form, "reference"))
    # Additive, what the columns add is rounded after the product of the weight has been.
    twin.assert_error_of_plain(*both, tensors, ALL, factor=1.5 if form == "resident" else 2.0)


@every_form
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_saved_bytes_are_tokens_times_columns(form, dtype) -> None:
    leaves = twin.leaves_of(make((2, 5), dtype=dtype), {"x", "delta"})
    kept = twin.bytes_kept(lambda: FORMS[form](**leaves, scaling=2.0), leaves.values())
    assert kept == 2 * 5 * RANK * dtype.itemsize


# Dynamo itself instantiates autograd Functions while it traces them.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@every_form
def test_compiles_whole_and_once(form) -> None:
    torch._dynamo.reset()
    tensors, function = make((4, 5), dtype=torch.float32), FORMS[form]
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(function, fullgraph=True, backend=counter)
    for step in range(4):
        tensors["weight"].mul_(1.0 + step)
        calls = (partial(one, scaling=0.5) for one in (compiled, function))
        twin.assert_equal(*(twin.gradients(c, tensors, ALL) for c in calls))
    assert counter.frame_count == 1


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("leading", SHAPES)
@every_form
def test_the_output_may_be_changed_in_place(form, leading, bias) -> None:
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


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("weight", torch.zeros(7), r"`weight` must be \(O, I\), got shape \(7,\)"),
        ("x", torch.zeros(5, 10), r"`x` must be \(\.\.\., I=11\).* got shape \(5, 10\)"),
        ("x", torch.tensor(1.0), r"`x` must be \(\.\.\., I=11\)"),
        ("delta", torch.zeros(12, 5), r"`delta` must be \(O=12, R=4\).* got shape \(12, 5\)"),
        ("indices", torch.zeros(4), r"`indices` must be \(R,\) int64, got .* torch.float32"),
        ("bias", torch.zeros(6), r"`bias` must be \(O=12,\), got shape \(6,\)"),
    ],
)
@every_form
def test_wrong_shapes(form, name, value, message) -> None:
    with pytest.raises(ValueError, match=message):
        FORMS[form](**{**make((5,), dtype=torch.float32), name: value}, scaling=1.0)


def _widened(a: Tensor, b: Tensor, scaling: float, dtype: torch.dtype) -> Tensor:
    """What a GPU's GEMM with a wider output computes."""
    return scaling * a.to(dtype).matmul(b.to(dtype))


@pytest.fixture(params=[True, False], ids=["widens", "casts"])
def gpu_branch(request, monkeypatch):
    """Run what GPUs run, with the GEMM that widens and without (torch before 2.8)."""
    monkeypatch.setattr(products, "_is_on_cpu", lambda x: False)
    monkeypatch.setattr(products, "_can_widen", lambda device, dtype, wide: request.param)
    monkeypatch.setattr(products, "_wide_product", _widened)
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
    tensors = make(leading, dtype=dtype)
    tensors["delta"] = tensors["delta"].to(delta_dtype)
    ours = gradients("resident", tensors, scaling, ALL)
    assert ours["delta"].dtype == delta_dtype
    assert ours["delta"].is_contiguous()
    numbers = {k: v.double() for k, v in tensors.items() if k != "indices"}
    exact = {**tensors, **numbers}
    truth = gradients("reference", exact, scaling, ALL)["delta"]
    # Rounded to 16 bits once, or not; the sums in float32.
    limit = 2**-8 if torch.bfloat16 in (dtype, delta_dtype) else 1e-5
    assert (ours["delta"].double() - truth).abs().max() <= limit * truth.abs().max()


def test_a_gemm_that_widens_does_not_round_to_16_bits(gpu_branch) -> None:
    gy, x = (normal(64, n, dtype=torch.bfloat16) for n in (48, 8))
    found = products.grad_delta(gy, x, 2.0, torch.float32)
    exact = 2.0 * gy.double().t().mm(x.double())
    error = (found.double() - exact).abs().max() / exact.abs().max()
    assert (error < 1e-6) == gpu_branch


@pytest.mark.parametrize("num_columns", [16, 17], ids=["by their product", "by thin products"])
@pytest.mark.parametrize(
    ("dtype", "factors"),
    [
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.bfloat16, torch.bfloat16),
    ],
)
@pytest.mark.usefixtures("gpu_branch")
def test_gradients_of_both_factors_by_the_branch_of_gpus(dtype, factors, num_columns) -> None:
    gy, x = normal(64, 48, dtype=dtype), normal(64, num_columns, dtype=dtype)
    delta, mix = normal(48, 4, dtype=factors), normal(4, num_columns, dtype=factors)
    found = products.grad_factors(gy, x, delta, mix, 0.75)
    exact = 0.75 * gy.double().t().mm(x.double())
    both = exact.mm(mix.double().t()), delta.double().t().mm(exact)
    limit = 2**-7 if torch.bfloat16 in (dtype, factors) else 1e-5
    for one, truth, factor in zip(found, both, (delta, mix), strict=True):
        assert one.dtype == factors
        assert one.shape == factor.shape
        assert (one.double() - truth).abs().max() <= limit * truth.abs().max()


@pytest.mark.usefixtures("filled_with_nan")
def test_what_addmm_adds_to_is_never_read() -> None:
    a, b = torch.randn(6, 4), torch.randn(4, 3)
    torch.testing.assert_close(products._addmm(a, b, 2.0), 2.0 * a.mm(b))


@pytest.mark.skipif("dtype" not in torch.ops.aten.addmm.overloads(), reason="torch before 2.8")
@pytest.mark.parametrize("scaling", [1.0, 2.0])
def test_torch_has_the_gemm_that_widens(scaling) -> None:
    """On tensors without memory, since CPUs have no kernel for it."""
    with FakeTensorMode():
        gy, x = torch.empty(5, 7, dtype=torch.bfloat16), torch.empty(5, 3, dtype=torch.bfloat16)
        found = products._wide_product(gy.t(), x, scaling, torch.float32)
    assert (found.shape, found.dtype) == ((7, 3), torch.float32)


def test_no_gemm_that_widens_is_found_on_a_cpu() -> None:
    assert not products._can_widen(torch.device("cpu"), torch.bfloat16, torch.float32)


def test_a_lack_of_memory_is_no_lack_of_a_product(monkeypatch):
    errors = [torch.OutOfMemoryError("CUDA out of memory")]

    def multiply(a, b, scaling, dtype):
        if errors:
            raise errors.pop()
        return a.to(dtype)

    monkeypatch.setattr(products, "_wide_product", multiply)
    tried = torch.device("cpu"), torch.float16, torch.float64
    with pytest.raises(torch.OutOfMemoryError):
        products._can_widen(*tried)
    assert products._can_widen(*tried)
    products._can_widen.cache_clear()
