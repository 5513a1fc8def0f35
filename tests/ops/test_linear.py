"""The hand-written gradients against plain autograd."""

import itertools

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from pacatune.ops import paca_linear, paca_linear_additive, reference

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


def run(form: str, tensors: dict[str, Tensor | None], scaling: float) -> Tensor:
    if form == "reference":
        return reference.paca_linear(**tensors, scaling=scaling)
    if form == "additive":
        return paca_linear_additive(**tensors, scaling=scaling)
    weight = reference.adapted_weight(
        tensors["weight"], tensors["delta"].detach(), tensors["indices"], scaling
    )
    return paca_linear(**{**tensors, "weight": weight}, scaling=scaling)


def gradients(
    form: str, tensors: dict[str, Tensor | None], scaling: float, trained: set[str]
) -> dict[str, Tensor | None]:
    leaves = {
        name: None
        if tensor is None
        else tensor.clone().requires_grad_(name in trained)
        if tensor.is_floating_point()
        else tensor
        for name, tensor in tensors.items()
    }
    y = run(form, leaves, scaling)
    if y.requires_grad:
        generator = torch.Generator().manual_seed(1)
        y.backward(torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y.dtype))
    found = {name: leaves[name].grad for name in ("x", "delta", "bias") if leaves[name] is not None}
    return {"y": y.detach(), **found}


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
@pytest.mark.parametrize("bias", ["none", "frozen", "trained"])
@pytest.mark.parametrize("leading", SHAPES)
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)], ids=["f64", "f32"]
)
def test_equal_to_reference(
    form: str, bias: str, leading: tuple[int, ...], dtype: torch.dtype, tolerance: float
) -> None:
    tensors = make(leading, dtype, bias != "none")
    for x_trained, delta_trained in itertools.product([True, False], repeat=2):
        trained = {"bias"} if bias == "trained" else set()
        trained |= {"x"} if x_trained else set()
        trained |= {"delta"} if delta_trained else set()
        ours = gradients(form, tensors, 0.75, trained)
        theirs = gradients("reference", tensors, 0.75, trained)
        for name, expected in theirs.items():
            if expected is None:
                assert ours[name] is None, name
            else:
                torch.testing.assert_close(ours[name], expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("leading", SHAPES)
def test_without_columns(form: str, leading: tuple[int, ...]) -> None:
    """A process of a tensor parallel model may hold none of them."""
    trained = {"x", "delta"}
    expected = gradients("reference", make(leading, rank=0), 0.7, trained)
    found = gradients(form, make(leading, rank=0), 0.7, trained)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, msg=name)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("delta_dtype", [torch.float32, None], ids=["delta32", "delta16"])
def test_low_precision_error_is_within_plain_autograds(
    form: str, dtype: torch.dtype, delta_dtype: torch.dtype | None
) -> None:
    tensors = make((64,), dtype, out_features=48, in_features=96, rank=8)
    tensors["delta"] = (tensors["delta"] * 0.01).to(delta_dtype or dtype)
    trained = {"x", "delta", "bias"}
    exact = {k: v if k == "indices" else v.double() for k, v in tensors.items()}
    truth = gradients("reference", exact, 2.0, trained)
    plain = gradients("reference", tensors, 2.0, trained)
    ours = gradients(form, tensors, 2.0, trained)
    for name, expected in truth.items():
        assert ours[name].dtype == plain[name].dtype
        budget = (plain[name].double() - expected).abs().max()
        error = (ours[name].double() - expected).abs().max()
        assert error <= 1.5 * budget + 1e-6, f"{name}: {error} > {budget}"


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("delta_dtype", [torch.float32, torch.bfloat16])
def test_autocast_as_reference(form: str, delta_dtype: torch.dtype) -> None:
    tensors = make((2, 5), torch.float32)
    tensors["delta"] = tensors["delta"].to(delta_dtype)
    results = []
    for which in (form, "reference"):
        with torch.autocast("cpu", torch.bfloat16):
            results.append(gradients(which, tensors, 1.0, {"x", "delta", "bias"}))
    for name, expected in results[1].items():
        assert results[0][name].dtype == expected.dtype, name
        torch.testing.assert_close(results[0][name], expected, atol=0.1, rtol=0.05)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_saved_bytes_are_tokens_times_rank(form: str, dtype: torch.dtype) -> None:
    tensors = make((2, 5), dtype)
    leaves = {k: v.requires_grad_(k in ("x", "delta")) for k, v in tensors.items()}
    kept: dict[int, int] = {}
    given = {v.untyped_storage().data_ptr() for v in leaves.values()}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    function = paca_linear if form == "resident" else paca_linear_additive
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        function(**leaves, scaling=2.0)
    own = {pointer: size for pointer, size in kept.items() if pointer not in given}
    assert sum(own.values()) == 2 * 5 * 3 * dtype.itemsize


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
        leaves = {k: v.clone() for k, v in tensors.items()}
        for name in ("x", "delta", "bias"):
            leaves[name].requires_grad_()
        leaves["weight"].mul_(1.0 + step)
        y = compiled(**leaves, scaling=0.5)
        y.sum().backward()
        eager = {k: v.detach().clone() for k, v in leaves.items()}
        for name in ("x", "delta", "bias"):
            eager[name].requires_grad_()
        function(**eager, scaling=0.5).sum().backward()
        for name in ("x", "delta", "bias"):
            torch.testing.assert_close(leaves[name].grad, eager[name].grad)
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
        y = run(which, tensors, 0.5)
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
