"""The linear maps of experts against plain autograd, in both layouts and both ways to compute."""

from functools import partial

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from pacatune import ops
from pacatune.ops import experts_linear, paca_experts_update
from pacatune.ops.columns import Update
from tests.ops import reference, twin
from tests.ops.twin import choose, filled_with_nan, normal  # noqa: F401  (a fixture)

paca_experts_linear = twin.by_parts(ops.paca_experts_linear)
NUM_EXPERTS, OUT_FEATURES, IN_FEATURES, RANK = 4, 8, 12, 4
# Where each expert's tokens end: two experts get none, one gets all, there are no tokens.
ROUTINGS = [(3, 3, 9, 9), (7, 7, 7, 7), (0, 0, 0, 0)]
LAYOUTS = pytest.mark.parametrize("is_transposed", [False, True], ids=["EOI", "EIO"])
WAYS = pytest.mark.parametrize("is_grouped", [False, True], ids=["per-expert", "grouped"])


def make(
    ends: tuple[int, ...] = ROUTINGS[0],
    dtype: torch.dtype = torch.float64,
    is_transposed: bool = False,
    rank: int = RANK,
    out_features: int = OUT_FEATURES,
    in_features: int = IN_FEATURES,
) -> dict[str, Tensor]:
    features = (in_features, out_features) if is_transposed else (out_features, in_features)
    return {
        "x": normal(ends[-1], in_features, dtype=dtype),
        "weight": normal(NUM_EXPERTS, *features, dtype=dtype, seed=1),
        "delta": normal(NUM_EXPERTS, out_features, rank, dtype=dtype, seed=2),
        "indices": choose(in_features, rank),
        "offsets": torch.tensor(ends, dtype=torch.int32),
    }


def gradients(function, tensors: twin.Tensors, trained: set[str], **options) -> twin.Tensors:
    return twin.gradients(partial(function, scaling=0.75, **options), tensors, trained)


@LAYOUTS
@pytest.mark.parametrize("ends", ROUTINGS)
def test_gradcheck(is_transposed: bool, ends: tuple[int, ...]) -> None:
    tensors = make(ends, is_transposed=is_transposed)
    x, delta = tensors.pop("x").requires_grad_(), tensors.pop("delta").requires_grad_()
    weight, offsets, indices = (tensors[name] for name in ("weight", "offsets", "indices"))
    options = {"scaling": 0.5, "is_transposed": is_transposed}
    assert torch.autograd.gradcheck(
        lambda x, delta: paca_experts_linear(x, delta=delta, **tensors, **options), (x, delta)
    )
    assert torch.autograd.gradcheck(
        lambda x: experts_linear(x, weight, offsets, is_transposed=is_transposed), (x,)
    )
    assert torch.autograd.gradcheck(
        lambda x, delta: paca_experts_update(x, Update(delta, indices, 0.5), offsets), (x, delta)
    )


@LAYOUTS
@WAYS
@pytest.mark.parametrize(
    ("ends", "dtype"),
    [*((ends, torch.float64) for ends in ROUTINGS), (ROUTINGS[0], torch.float32)],
)
def test_equal_to_reference(is_transposed, is_grouped, ends, dtype) -> None:
    layout = {"is_transposed": is_transposed}
    tensors = make(ends, dtype, is_transposed)
    for trained in twin.subsets(("x", "delta")):
        ours = gradients(paca_experts_linear, tensors, trained, **layout, is_grouped=is_grouped)
        theirs = gradients(reference.paca_experts_linear, tensors, trained, **layout)
        twin.assert_equal(ours, theirs, 1e-12 if dtype == torch.float64 else 1e-5)


@WAYS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("layout", ["expanded", "transposed", "strided"])
def test_gradients_in_any_memory_layout(is_grouped: bool, dtype: torch.dtype, layout: str) -> None:
    """A sum's gradient has no strides, that of a transposed output has them exchanged."""
    tensors = make(dtype=dtype)
    shape = (len(tensors["x"]), OUT_FEATURES)
    gy = {
        "expanded": torch.ones(1, 1, dtype=dtype).expand(shape),
        "transposed": normal(*shape[::-1], dtype=dtype).t(),
        "strided": normal(shape[0], 3 * shape[1], dtype=dtype)[:, ::3],
    }[layout]
    assert not gy.is_contiguous()
    found = []
    for given in (gy, gy.contiguous()):
        leaves = twin.leaves_of(tensors, {"x", "delta"})
        y = paca_experts_linear(**leaves, scaling=0.75, is_grouped=is_grouped)
        found.append(torch.autograd.grad(y, (leaves["x"], leaves["delta"]), given))
    for one, two in zip(*found, strict=True):
        torch.testing.assert_close(one, two)


@pytest.mark.parametrize("ends", [(3, 3, 5, 6), (0, 0, 0, 0)])
@pytest.mark.usefixtures("filled_with_nan")
def test_rows_that_no_expert_takes_are_zero(ends) -> None:
    """Routed elsewhere, as with experts on several devices."""
    tensors = {**make(), "offsets": torch.tensor(ends, dtype=torch.int32)}
    found = gradients(paca_experts_linear, tensors, {"x", "delta"})
    routed = gradients(
        paca_experts_linear, {**tensors, "x": tensors["x"][: ends[-1]]}, {"x", "delta"}
    )
    for name in ("y", "x"):
        torch.testing.assert_close(found[name][: ends[-1]], routed[name])
        assert torch.equal(found[name][ends[-1] :], torch.zeros_like(found[name][ends[-1] :]))
    torch.testing.assert_close(found["delta"], routed["delta"])


class Seen(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.name())
        if func.name() == "aten::_grouped_mm":  # as torch checks on CUDA alone
            assert all(tensor.data_ptr() % 16 == 0 for tensor in args[:2])
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("dtype", "rank", "number"),
    [
        (torch.float32, 4, 5),  # two products forward, two and the gradient of delta backward
        (torch.float32, 3, 2),  # rows of 12 bytes: only the frozen weights' products
        (torch.bfloat16, 8, 3),  # 12 in_features are 24 bytes: all but the frozen weights'
        (torch.float64, 4, 0),
    ],
)
@pytest.mark.skipif(not hasattr(F, "grouped_mm"), reason="this torch has no grouped GEMM")
def test_grouped_products_where_torch_takes_them(dtype, rank: int, number: int) -> None:
    with Seen() as seen:
        gradients(
            paca_experts_linear, make(dtype=dtype, rank=rank), {"x", "delta"}, is_grouped=True
        )
    assert seen.names.count("aten::_grouped_mm") == number
    with Seen() as seen:
        gradients(paca_experts_linear, make(dtype=dtype, rank=rank), {"x", "delta"})
    assert "aten::_grouped_mm" not in seen.names


@LAYOUTS
@WAYS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("delta_dtype", [torch.float32, None])
def test_low_precision_error_is_within_plain_autograds(
    is_transposed, is_grouped, dtype, delta_dtype
) -> None:
    tensors = make((30, 30, 61, 64), dtype, is_transposed, 8, 48, 96)
    tensors["delta"] = (tensors["delta"] * 0.01).to(delta_dtype or dtype)
    options = {"scaling": 0.75, "is_transposed": is_transposed}
    ours = partial(paca_experts_linear, **options, is_grouped=is_grouped)
    theirs = partial(reference.paca_experts_linear, **options)
    # The sum of two products is rounded twice, the product with one written weight once.
    twin.assert_error_of_plain(ours, theirs, tensors, {"x", "delta"}, 2)


@LAYOUTS
@WAYS
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_saved_bytes_are_routed_tokens_times_rank(is_transposed, is_grouped, dtype) -> None:
    tensors = make(dtype=dtype, is_transposed=is_transposed)
    leaves = twin.leaves_of(tensors, {"x", "delta"})
    options = {"is_transposed": is_transposed, "is_grouped": is_grouped}

    def call() -> object:  # both are alive while bytes are counted
        one = paca_experts_linear(**leaves, scaling=2.0, **options)
        return one, experts_linear(leaves["x"], leaves["weight"], leaves["offsets"], **options)

    assert twin.bytes_kept(call, leaves.values()) == 9 * RANK * dtype.itemsize


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("weight", torch.zeros(8, 12), r"`weight` must be \(E, O, I\), got shape \(8, 12\)"),
        ("x", torch.zeros(9, 8), r"`x` must be \(S, I=12\).*\(E, O, I\); got shape \(9, 8\)"),
        ("offsets", torch.zeros(3, dtype=torch.int32), r"`offsets` must be \(E=4,\) int32"),
        ("delta", torch.zeros(8, 4), r"`delta` must be \(E=4, O, R\).*got shape \(8, 4\)"),
        ("delta", torch.zeros(4, 7, 4), r"`delta` must be \(E=4, O=8, R\).*\(4, 7, 4\)"),
        ("delta", torch.zeros(4, 8, 5), "`delta` is of 5 columns, and `indices` has 4"),
        ("indices", torch.zeros(4), r"`indices` must be \(R,\) int64, got .* torch.float32"),
    ],
)
def test_wrong_shapes(name: str, value: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        paca_experts_linear(**{**make(dtype=torch.float32), name: value}, scaling=1.0)
    with pytest.raises(ValueError, match=r"`x` must be \(S, I=8\) to fit `weight` \(4, 8, 12\), "):
        paca_experts_linear(**make(), scaling=1.0, is_transposed=True)
