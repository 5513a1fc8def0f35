"""What a convolution keeps for backward, and what it leaves as it was."""

import pytest
import torch

from pacatune.ops import paca_conv
from pacatune.ops.columns import select_channels
from tests.ops import twin
from tests.ops.test_convolution import CASES, ROW_GROUPS, gradients, make

# torch's own remark on the reference.
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")


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


@pytest.mark.parametrize("case", CASES)
def test_the_weight_is_never_written(case: str) -> None:
    tensors, options = make(case)
    before, version = tensors["weight"].clone(), tensors["weight"]._version
    tensors["x"].requires_grad_()
    tensors["delta"].requires_grad_()
    paca_conv(**tensors, scaling=1.0, **options).sum().backward()
    assert torch.equal(tensors["weight"], before)
    assert tensors["weight"]._version == version


# On a CPU torch itself loses the order of bfloat16 in three dimensions.
@pytest.mark.parametrize(
    ("case", "dtype"),
    [(case, torch.float32) for case in (*CASES, *ROW_GROUPS) if case[0] != "1"]
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


def test_selected_channels_keep_the_memory_order() -> None:
    indices = torch.tensor([0, 2])
    for x, num_dims in (
        (torch.randn(2, 5, 4, 3).contiguous(memory_format=torch.channels_last), 2),
        (torch.randn(2, 9, 5).transpose(1, 2), 1),
        (torch.randn(2, 5, 9), 1),
        (torch.randn(5, 4, 3), 2),
    ):
        dim = x.dim() - num_dims - 1
        chosen = select_channels(x, indices, num_dims)
        assert torch.equal(chosen, x.index_select(dim, indices))
        assert (chosen.stride(dim) == 1) == (x.stride(dim) == 1)
