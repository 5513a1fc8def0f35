"""Row groups with columns of their own, in every operation, against plain autograd."""

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn import functional as F

from pacatune.lean import ACTIVATIONS
from pacatune.ops import (
    linear,
    paca_conv,
    paca_experts_linear,
    paca_linear,
    paca_linear_additive,
    paca_quantized_linear,
    reference,
)
from pacatune.ops.columns import put_columns_, read_columns, with_columns
from pacatune.ops.linear import apply_paca_linear
from pacatune.ops.row_groups import (
    distinct_and_places,
    flat_positions,
    joined_groups,
    of_rows,
    row_index,
    select,
)
from tests.ops import twin
from tests.ops.twin import assert_equal, normal

OUT, IN, RANK, GROUPS = 12, 20, 4, 3
# With so few inputs most of them are trained by some group, and the input itself is kept.
FEW = 11
SCALING = 0.75
SHAPES = [(), (5,), (2, 5), (0,), (2, 0)]
FORMS = ["resident", "additive"]


def choose(groups: int = GROUPS, columns: int = IN, rank: int = RANK) -> Tensor:
    """Columns of which some belong to several groups."""
    generator = torch.Generator().manual_seed(0)
    chosen = [torch.randperm(columns, generator=generator)[:rank] for _ in range(groups)]
    return torch.stack(chosen).sort(1).values


def make(leading, dtype=torch.float64, out=OUT, columns=IN, groups=GROUPS, rank=RANK):
    return {
        "x": normal(*leading, columns, dtype=dtype),
        "weight": normal(out, columns, dtype=dtype, seed=1),
        "delta": normal(out, rank, dtype=dtype, seed=2),
        "indices": choose(groups, columns, rank),
        "bias": normal(out, dtype=dtype, seed=3),
    }


def run(form: str, tensors: dict[str, Tensor]) -> Tensor:
    if form == "reference":
        return reference.paca_linear(**tensors, scaling=SCALING)
    if form == "additive":
        return paca_linear_additive(**tensors, scaling=SCALING)
    update = tensors["delta"].detach(), tensors["indices"], SCALING
    weight = reference.adapted_weight(tensors["weight"], *update)
    return paca_linear(**{**tensors, "weight": weight}, scaling=SCALING)


def gradients(function, tensors: twin.Tensors, trained: set[str]) -> twin.Tensors:
    return twin.gradients(lambda **leaves: function(leaves), tensors, trained)


def linear_gradients(form: str, tensors, trained):
    return gradients(lambda leaves: run(form, leaves), tensors, trained)


@pytest.fixture(params=["whole", "own"])
def product(request, monkeypatch) -> None:
    """Find the gradient of delta by the product of all kept columns, or of each group's own."""
    monkeypatch.setattr(linear, "_is_faster_whole", lambda *_: request.param == "whole")


@pytest.mark.usefixtures("product")
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("columns", [IN, FEW])
def test_gradcheck(form, columns) -> None:
    tensors = make((2, 5), columns=columns)
    leaves = [tensors[name].requires_grad_() for name in ("x", "delta", "bias")]

    def function(x: Tensor, delta: Tensor, bias: Tensor) -> Tensor:
        # The resident form reads its columns from the weight, so delta moves the outputs there.
        return run(form, {**tensors, "x": x, "delta": delta, "bias": bias})

    if form == "resident":
        tensors["delta"].requires_grad_(False)
        leaves = leaves[::2]
        assert torch.autograd.gradcheck(lambda x, b: function(x, tensors["delta"], b), leaves)
    else:
        assert torch.autograd.gradcheck(function, leaves)


@pytest.mark.usefixtures("product")
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("leading", "dtype", "columns"),
    [
        *((leading, torch.float64, columns) for leading in SHAPES for columns in (IN, FEW)),
        ((2, 5), torch.float32, IN),
    ],
)
def test_equal_to_reference(form, leading, dtype, columns) -> None:
    tensors = make(leading, dtype, columns=columns)
    for trained in twin.subsets(("x", "delta", "bias")):
        found = (linear_gradients(one, tensors, trained) for one in (form, "reference"))
        assert_equal(*found, 1e-12 if dtype == torch.float64 else 1e-5)


def test_the_reference_is_a_mask_on_the_full_gradient() -> None:
    tensors = make((9,))
    weight = tensors["weight"].clone().requires_grad_()
    gy = normal(9, OUT, seed=1)
    F.linear(tensors["x"], weight).backward(gy)
    tensors["delta"].zero_()
    found = linear_gradients("reference", tensors, {"delta"})["delta"]
    for row in range(OUT):
        columns = tensors["indices"][row // (OUT // GROUPS)]
        torch.testing.assert_close(found[row], SCALING * weight.grad[row, columns])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("delta_dtype", [torch.float32, None], ids=["delta32", "delta16"])
def test_low_precision_error_is_within_plain_autograds(form, dtype, delta_dtype) -> None:
    tensors = make((64,), dtype, out=48, columns=96, groups=6, rank=8)
    tensors["delta"] = (tensors["delta"] * 0.01).to(delta_dtype or dtype)
    both = (lambda one=one, **leaves: run(one, leaves) for one in (form, "reference"))
    # Additive, what the columns add is rounded after the product of the weight has been.
    factor = 1.5 if form == "resident" else 2.0
    twin.assert_error_of_plain(*both, tensors, {"x", "delta", "bias"}, factor)


@pytest.mark.parametrize("form", FORMS)
def test_a_column_of_several_groups_is_kept_once(form) -> None:
    tensors = make((2, 5))
    distinct = tensors["indices"].unique()
    assert len(distinct) < tensors["indices"].numel()
    given = [*tensors.values(), *distinct_and_places(tensors["indices"])]
    for name in ("x", "delta"):
        tensors[name].requires_grad_()
    function = paca_linear if form == "resident" else paca_linear_additive
    kept = twin.bytes_kept(lambda: function(**tensors, scaling=SCALING), given)
    assert kept == 2 * 5 * len(distinct) * 8


@pytest.mark.parametrize("form", FORMS)
def test_layers_that_share_an_input_keep_it_once_where_most_of_it_is_trained(form) -> None:
    tensors = make((2, 5), columns=FEW)
    for name in ("x", "delta"):
        tensors[name].requires_grad_()
    both = tensors["indices"], tensors["indices"].flip(0)
    function = paca_linear if form == "resident" else paca_linear_additive
    given = [*tensors.values(), *both, *(t for one in both for t in distinct_and_places(one))]

    def layers():
        x = tensors["x"] * 1.0
        for indices in both:
            function(**{**tensors, "x": x, "indices": indices}, scaling=SCALING)

    assert twin.bytes_kept(layers, given) == 2 * 5 * FEW * 8


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("columns", [IN, FEW])
@pytest.mark.parametrize("form", FORMS)
def test_compiles_whole_and_once(form, columns) -> None:
    counter = CompileCounterWithBackend("aot_eager")
    function = paca_linear if form == "resident" else paca_linear_additive
    compiled = torch.compile(function, fullgraph=True, backend=counter)
    for step in range(3):
        found = []
        for one in (compiled, function):
            tensors = make((4, 5), torch.float32, columns=columns)
            tensors["weight"].mul_(1.0 + step)
            trained = {"x", "delta", "bias"}
            call = lambda leaves, one=one: one(**leaves, scaling=SCALING)  # noqa: E731
            found.append(gradients(call, tensors, trained))
        assert_equal(*found)
    assert counter.frame_count == 1


@pytest.fixture(params=[True, False], ids=["widens", "casts"])
def gpu_branch(request, monkeypatch):
    """Run what GPUs run, with the GEMM that widens and without (torch before 2.8)."""

    def widened(a: Tensor, b: Tensor, scaling: float, dtype: torch.dtype) -> Tensor:
        return scaling * a.to(dtype).matmul(b.to(dtype))

    monkeypatch.setattr(linear, "_is_on_cpu", lambda x: False)
    monkeypatch.setattr(linear, "_can_widen", lambda device, dtype, wide: request.param)
    monkeypatch.setattr(linear, "_wide_product", widened)


@pytest.mark.usefixtures("product")
@pytest.mark.parametrize("leading", [(5,), (0,), (2, 200)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradient_of_delta_by_the_branch_of_gpus(gpu_branch, leading, dtype) -> None:
    tensors = make(leading, dtype)
    tensors["delta"] = tensors["delta"].float()
    ours = linear_gradients("resident", tensors, {"x", "delta"})["delta"]
    assert ours.is_contiguous()
    exact = {k: v if k == "indices" else v.double() for k, v in tensors.items()}
    truth = linear_gradients("reference", exact, {"x", "delta"})["delta"]
    size = float(truth.abs().max())
    limit = 1e-5 if dtype is torch.float32 else 1.5 * 2**-8  # rounded once more where it scales
    assert (ours.double() - truth).abs().max() <= limit * size


@pytest.mark.usefixtures("product", "gpu_branch")
def test_gradient_of_delta_without_a_scale_on_gpus() -> None:
    tensors, gy = make((5,)), normal(5, OUT, seed=1)
    kept = select(tensors["x"], tensors["indices"])
    found = linear.grad_delta(gy, kept, 1.0, torch.float64, tensors["indices"])
    whole = gy.t().mm(tensors["x"])
    torch.testing.assert_close(found, whole.gather(1, row_index(tensors["indices"], whole.shape)))


def test_new_indices_in_the_same_memory_are_seen() -> None:
    tensors = make((5,))
    linear_gradients("additive", tensors, {"delta"})
    tensors["indices"].copy_((tensors["indices"] + 1).sort(1).values % IN)
    tensors["indices"].copy_(tensors["indices"].sort(1).values)
    ours = linear_gradients("additive", tensors, {"x", "delta"})
    theirs = linear_gradients("reference", tensors, {"x", "delta"})
    assert_equal(ours, theirs)


@pytest.mark.parametrize("dims", [1, 2])
@pytest.mark.parametrize("is_channels_last", [False, True])
def test_convolutions(dims, is_channels_last) -> None:
    kernel = [3] * dims
    tensors = {
        "x": normal(2, IN, *[6] * dims),
        "weight": normal(OUT, IN, *kernel, seed=1),
        "delta": normal(OUT, RANK, *kernel, seed=2),
        "indices": choose(),
        "bias": normal(OUT, seed=3),
    }
    if is_channels_last and dims == 2:
        tensors["x"] = tensors["x"].to(memory_format=torch.channels_last)
    trained = {"x", "delta", "bias"}
    ours, theirs = (
        gradients(lambda t, f=f: f(**t, scaling=SCALING, stride=2, padding=1), tensors, trained)
        for f in (paca_conv, reference.paca_conv)
    )
    assert_equal(ours, theirs)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_convolutions_compile() -> None:
    tensors = {
        "x": normal(2, IN, 6),
        "weight": normal(OUT, IN, 3, seed=1),
        "delta": normal(OUT, RANK, 3, seed=2),
        "indices": choose(),
    }
    compiled = torch.compile(paca_conv, fullgraph=True, backend="aot_eager")
    ours, theirs = (
        gradients(lambda t, f=f: f(**t, scaling=SCALING), tensors, {"x", "delta"})
        for f in (compiled, reference.paca_conv)
    )
    assert_equal(ours, theirs)


@pytest.mark.parametrize("is_transposed", [False, True])
@pytest.mark.parametrize("is_grouped", [False, True])
@pytest.mark.parametrize("is_compiled", [False, True])
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_experts(is_transposed, is_grouped, is_compiled) -> None:
    weight = normal(4, OUT, IN, seed=1)
    tensors = {
        "x": normal(9, IN),
        "weight": weight.transpose(1, 2).contiguous() if is_transposed else weight,
        "delta": normal(4, OUT, RANK, seed=2),
        "indices": choose(),
        "offsets": torch.tensor([3, 3, 7, 9], dtype=torch.int32),
    }
    function = paca_experts_linear
    if is_compiled:
        function = torch.compile(function, fullgraph=True, backend="aot_eager")
    ours = gradients(
        lambda t: function(
            **t, scaling=SCALING, is_transposed=is_transposed, is_grouped=is_grouped
        ),
        tensors,
        {"x", "delta"},
    )
    theirs = gradients(
        lambda t: reference.paca_experts_linear(**t, scaling=SCALING, is_transposed=is_transposed),
        tensors,
        {"x", "delta"},
    )
    assert_equal(ours, theirs)


def test_low_precision_error_of_experts_is_within_plain_autograds() -> None:
    tensors = {
        "x": normal(64, 96, dtype=torch.bfloat16),
        "weight": normal(4, 48, 96, dtype=torch.bfloat16, seed=1),
        "delta": normal(4, 48, 8, seed=2).float() * 0.5,
        "indices": choose(groups=6, columns=96, rank=8),
        "offsets": torch.tensor([16, 16, 40, 64], dtype=torch.int32),
    }
    both = paca_experts_linear, reference.paca_experts_linear
    calls = (lambda one=one, **leaves: one(**leaves, scaling=SCALING) for one in both)
    twin.assert_error_of_plain(*calls, tensors, {"x", "delta"}, 2.0)


@pytest.mark.parametrize("has_kernel", [False, True])
def test_quantised(has_kernel) -> None:
    weight = normal(OUT, IN, seed=1)
    tensors = {k: v for k, v in make((2, 5)).items() if k in ("x", "delta", "bias")}
    indices, trained = choose(), {"x", "delta", "bias"}
    multiply = (lambda x: F.linear(x, weight)) if has_kernel else None
    if has_kernel:  # which adds the bias itself
        del tensors["bias"]
        trained.discard("bias")
    ours = gradients(
        lambda t: paca_quantized_linear(
            t["x"], t["delta"], indices, SCALING, lambda _: weight.clone(), t.get("bias"), multiply
        ),
        tensors,
        trained,
    )
    theirs = gradients(
        lambda t: reference.paca_linear(
            t["x"], weight, t["delta"], indices, SCALING, t.get("bias")
        ),
        tensors,
        trained,
    )
    assert_equal(ours, theirs)


@pytest.mark.parametrize("is_resident", [True, False])
def test_gated(is_resident) -> None:
    tensors = {"gate": normal(2, 5, IN), "up": normal(2, 5, IN, seed=5)}
    tensors |= {"delta": normal(OUT, RANK, seed=2), "bias": normal(OUT, seed=3)}
    weight, indices, act = normal(OUT, IN, seed=1), choose(), ACTIVATIONS["silu"]

    def ours(t: dict[str, Tensor]) -> Tensor:
        used = weight
        if is_resident:
            used = reference.adapted_weight(weight, t["delta"].detach(), indices, SCALING)
        update = t["delta"], indices, SCALING
        return apply_paca_linear(
            t["up"], used, *update, t["bias"], is_resident, None, act, t["gate"]
        )

    def theirs(t: dict[str, Tensor]) -> Tensor:
        h = act.value(t["gate"]) * t["up"]
        return reference.paca_linear(h, weight, t["delta"], indices, SCALING, t["bias"])

    found, expected = (gradients(f, tensors, set(tensors)) for f in (ours, theirs))
    assert_equal(found, expected)


@pytest.mark.parametrize(
    ("shape", "dim", "row_dim"),
    [((12, 11), 1, 0), ((11, 12), 0, 1), ((2, 12, 11), 2, 1), ((2, 11, 12), 1, 2)],
)
def test_where_columns_are(shape, dim, row_dim) -> None:
    weight, indices = normal(*shape), choose(columns=11)
    columns = read_columns(weight, indices, dim=dim, row_dim=row_dim)
    turned = weight.movedim((row_dim, dim), (0, 1))
    found = columns.movedim((row_dim, dim), (0, 1))
    for row in range(12):
        assert found[row].equal(turned[row, indices[row // 4]])
    assert columns.flatten().equal(
        weight.flatten()[flat_positions(indices, shape, dim, row_dim).flatten()]
    )
    changed = weight.clone()
    put_columns_(changed, indices, columns + 1, dim=dim, row_dim=row_dim)
    assert read_columns(changed, indices, dim=dim, row_dim=row_dim).equal(columns + 1)
    assert int((changed != weight).sum()) == columns.numel()
    if (dim, row_dim) == (1, 0) and len(shape) == 2:
        assert with_columns(weight, indices, columns + 1).equal(changed)


def test_joined_groups_are_the_same_update() -> None:
    indices, update = choose(), normal(OUT, RANK, 3)
    joined, distinct = joined_groups(update, indices)
    for row in range(OUT):
        dense = torch.zeros(IN, 3, dtype=torch.float64)
        dense[indices[row // 4]] = update[row]
        assert joined[row].equal(dense[distinct])


@pytest.mark.parametrize(("first", "last"), [(0, 12), (0, 4), (4, 12), (0, 6), (2, 3), (5, 5)])
def test_columns_of_some_rows(first, last) -> None:
    indices, weight = choose(), normal(OUT, IN)
    own = of_rows(indices, OUT, first, last)
    expected = read_columns(weight, indices)[first:last]
    assert read_columns(weight[first:last], own).equal(expected)
    alone = indices[0]
    assert of_rows(alone, OUT, first, last) is alone


def test_an_index_is_no_copy_where_dimensions_repeat() -> None:
    index = row_index(choose(), (5, OUT, IN), 2, 1)
    assert index.shape == (5, OUT, RANK)
    assert index.untyped_storage().nbytes() == OUT * RANK * 8


@pytest.mark.parametrize(
    ("indices", "message"),
    [
        (torch.zeros(5, 2, dtype=torch.int64), "has 5 row groups, which must divide O=12"),
        (torch.zeros(1, 1, 2, dtype=torch.int64), r"those of row groups are \(G, R\)"),
    ],
)
@pytest.mark.parametrize("function", [paca_linear, paca_linear_additive])
def test_wrong_indices(function, indices, message) -> None:
    with pytest.raises(ValueError, match=message):
        function(**{**make((5,)), "indices": indices}, scaling=1.0)


def test_a_convolution_with_groups_of_its_own_is_refused() -> None:
    x, weight, delta = normal(2, 12, 6), normal(OUT, 6, 3), normal(6, RANK, 3)
    with pytest.raises(ValueError, match="which a convolution with groups=2 of its own cannot"):
        paca_conv(x, weight, delta, choose(3, 12), 1.0, groups=2)


@pytest.mark.parametrize("form", FORMS)
def test_distinct_columns_are_found_once(form, monkeypatch) -> None:
    """Though hooks, as of offloading, give copies of what is saved back."""
    found, unique = [], torch.unique
    monkeypatch.setattr(torch, "unique", lambda *a, **k: found.append(a) or unique(*a, **k))
    tensors = make((5,))
    for _ in range(3):
        with torch.autograd.graph.saved_tensors_hooks(lambda x: x.clone(), lambda x: x):
            linear_gradients(form, tensors, {"x", "delta"})
    assert len(found) == 1
