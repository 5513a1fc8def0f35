"""The hand-written gradients of convolutions against plain autograd, and what they keep."""

from functools import partial

import pytest
import torch
from torch import Tensor

from pacatune import ops
from pacatune.ops.columns import Update
from tests.ops import reference, twin
from tests.ops.twin import choose, normal

paca_conv = twin.by_parts(ops.paca_conv)
# Per case: I, O, kernel size in each dimension, rank, and what F.conv2d calls by these names.
CASES = {
    "1d": (5, 4, (3,), 2, {}),
    "1d strided": (5, 4, (4,), 3, {"stride": 2, "padding": 1}),
    "1d dilated": (5, 4, (3,), 2, {"dilation": 2, "padding": "same"}),
    "1d depthwise": (6, 6, (4,), 3, {"padding": 3, "groups": 6}),
    "2d": (5, 4, (3, 3), 2, {}),
    "2d pointwise": (5, 4, (1, 1), 2, {}),
    "2d strided": (5, 4, (3, 2), 3, {"stride": (2, 1), "padding": (1, 0), "dilation": (1, 2)}),
    "2d even same": (5, 4, (2, 4), 2, {"padding": "same"}),
    "2d valid": (5, 4, (2, 3), 5, {"padding": "valid"}),
    "2d groups": (6, 4, (3, 3), 3, {"groups": 2, "padding": 1}),
    "2d groups, same, dilated": (6, 9, (2, 3), 4, {"groups": 3, "padding": "same", "dilation": 2}),
    "2d depthwise": (6, 6, (3, 3), 2, {"groups": 6, "stride": 2, "padding": 1}),
    "2d depthwise, multiplier": (4, 12, (3, 3), 3, {"groups": 4, "padding": 1}),
    "2d fewer outputs than inputs": (8, 4, (2, 2), 5, {"groups": 4}),
    "3d": (3, 4, (2, 3, 2), 2, {"stride": (1, 2, 1), "padding": 1}),
    "3d groups": (4, 4, (2, 2, 3), 3, {"groups": 2, "padding": "same"}),
    "3d depthwise": (4, 8, (3, 3, 3), 2, {"groups": 4, "padding": 1}),
}
POSITIONS = {1: (9,), 2: (7, 6), 3: (5, 6, 4)}
# torch's own remark on the reference.
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")
RUN = {"paca": paca_conv, "reference": reference.paca_conv}


def make(
    case: str, dtype: torch.dtype = torch.float64, bias: bool = True, batch: tuple[int, ...] = (2,)
) -> tuple[dict[str, Tensor | None], dict]:
    in_channels, out_channels, kernel_size, rank, options = CASES[case]
    groups = options.get("groups", 1)
    tensors = {
        "x": normal(*batch, in_channels, *POSITIONS[len(kernel_size)], dtype=dtype),
        "weight": normal(out_channels, in_channels // groups, *kernel_size, dtype=dtype, seed=1),
        "delta": normal(out_channels // groups, rank, *kernel_size, dtype=dtype, seed=2),
        "indices": choose(in_channels, rank),
        "bias": normal(out_channels, dtype=dtype, seed=3) if bias else None,
    }
    return tensors, dict(options)


def gradients(which: str, tensors: twin.Tensors, options: dict, trained: set[str]) -> twin.Tensors:
    return twin.gradients(partial(RUN[which], scaling=0.75, **options), tensors, trained)


@pytest.mark.parametrize("case", CASES)
def test_gradcheck(case: str) -> None:
    tensors, options = make(case, batch=(1,))
    weight, indices = tensors["weight"], tensors["indices"]

    def function(x: Tensor, delta: Tensor, bias: Tensor) -> Tensor:
        return ops.paca_conv(x, weight, Update(delta, indices, 0.5), bias, **options)

    leaves = [tensors[name].requires_grad_() for name in ("x", "delta", "bias")]
    assert torch.autograd.gradcheck(function, leaves)


@pytest.mark.parametrize(
    ("case", "bias", "batch", "dtype"),
    [
        *((case, "trained", (3,), torch.float64) for case in CASES),
        *(
            (case, bias, batch, torch.float64)
            for case in ("1d", "2d groups, same, dilated", "3d")
            for bias, batch in (("none", (3,)), ("frozen", ()), ("trained", (0,)))
        ),
        *((case, "trained", (3,), torch.float32) for case in ("1d", "2d groups", "3d depthwise")),
    ],
)
def test_equal_to_reference(
    case: str, bias: str, batch: tuple[int, ...], dtype: torch.dtype
) -> None:
    tensors, options = make(case, dtype, bias != "none", batch)
    for trained in twin.subsets(("x", "delta")):
        trained |= {"bias"} if bias == "trained" else set()
        found = (gradients(one, tensors, options, trained) for one in RUN)
        twin.assert_equal(*found, 1e-12 if dtype == torch.float64 else 1e-4)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("weight", torch.zeros(4, 3), r"`weight` must be \(O, I/G, \*k\).* got shape \(4, 3\)"),
        ("weight", torch.zeros(5, 3, 3, 3), r"O a multiple of groups=2, got shape \(5, 3, 3, 3\)"),
        ("x", torch.zeros(2, 5, 7, 6), r"`x` must be \(B, I=6.* got shape \(2, 5, 7, 6\)"),
        ("delta", torch.zeros(4, 3, 3, 3), r"`delta` must be .* = \(2, 3, 3, 3\) to fit"),
        ("indices", torch.zeros(3), r"`indices` must be \(R,\) int64, got .* torch.float32"),
        ("bias", torch.zeros(3), r"`bias` must be \(O=4,\), got shape \(3,\)"),
        ("padding", "full", r"`padding` \('full'\) must be 'same', 'valid' or numbers"),
    ],
)
def test_wrong_shapes(name: str, value: Tensor | str, message: str) -> None:
    tensors, options = make("2d groups", torch.float32)
    with pytest.raises(ValueError, match=message):
        paca_conv(**{**tensors, **options, name: value}, scaling=1.0)


def test_same_with_a_stride_is_refused() -> None:
    tensors, _ = make("2d", torch.float32)
    with pytest.raises(ValueError, match=r"'same' needs stride 1, got stride=\(2, 2\)"):
        paca_conv(**tensors, scaling=1.0, stride=2, padding="same")


# What is kept for backward, and left as it was.


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saved_bytes(case: str, dtype: torch.dtype) -> None:
    """B * R * positions elements, and nothing the caller has not got already."""
    tensors, options = make(case, dtype)
    leaves = twin.leaves_of(tensors, {"x", "delta"})
    kept = twin.bytes_kept(lambda: paca_conv(**leaves, scaling=2.0, **options), leaves.values())
    positions = list(leaves["x"].shape[2:])
    if options.get("padding") == "same":  # an odd row of zeros on one side
        step = options.get("dilation", 1)
        sizes = leaves["weight"].shape[2:]
        positions = [n + step * (k - 1) % 2 for n, k in zip(positions, sizes, strict=True)]
    numel = 2 * len(leaves["indices"]) * torch.Size(positions).numel()
    assert kept == numel * dtype.itemsize


# On a CPU torch itself loses the order of bfloat16 in three dimensions.
@pytest.mark.parametrize(
    ("case", "dtype"),
    [(case, torch.float32) for case in CASES if case[0] != "1"]
    + [(case, torch.bfloat16) for case in CASES if case[0] == "2"],
)
def test_channels_last_stays_channels_last(case: str, dtype: torch.dtype) -> None:
    tensors, options = make(case, dtype)
    plain = gradients("paca", tensors, options, {"x", "delta", "bias"})
    order = torch.channels_last if tensors["x"].dim() == 4 else torch.channels_last_3d
    x = tensors["x"].contiguous(memory_format=order).requires_grad_()
    delta = tensors["delta"].clone().requires_grad_()
    y = paca_conv(**{**tensors, "x": x, "delta": delta}, scaling=0.75, **options)
    assert y.is_contiguous(memory_format=order)
    gy = twin.normal(*y.shape, dtype=dtype, seed=1)
    (gx,) = torch.autograd.grad(y, x, gy.contiguous(memory_format=order), retain_graph=True)
    (gdelta,) = torch.autograd.grad(y, delta, gy.contiguous(memory_format=order))
    assert gx.is_contiguous(memory_format=order)
    assert gdelta.is_contiguous()
    tolerance = 1e-4 if dtype == torch.float32 else 0.15
    for ours, name in ((y, "y"), (gx, "x"), (gdelta, "delta")):
        torch.testing.assert_close(ours, plain[name], atol=tolerance, rtol=tolerance)
