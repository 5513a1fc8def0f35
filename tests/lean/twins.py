"""What the tests of lean/ share: gradients of a function, bytes that it keeps, error bounds."""

import torch

from pacatune.measure.counters import SavedBytes

NOTHING = torch.nn.Module()


def leaves(tensors, trained):
    """Copy tensors as leaves that ask for a gradient where named."""
    return {
        name: tensor
        if tensor is None or not tensor.is_floating_point()
        else tensor.clone().requires_grad_(name in trained)
        for name, tensor in tensors.items()
    }


def cast(tensors, dtype):
    """Return floating tensors in another dtype, and the others as they are."""
    return {
        name: x.to(dtype) if isinstance(x, torch.Tensor) and x.is_floating_point() else x
        for name, x in tensors.items()
    }


def run(function, tensors, trained, seed=1):
    """Return output and gradients by name, and the bytes kept, inputs included."""
    inputs = leaves(tensors, trained)
    with SavedBytes(NOTHING) as saved:
        y = function(**inputs)
    generator = torch.Generator().manual_seed(seed)
    if y.requires_grad:
        gy = torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y.dtype)
        y.backward(gy)
    found = {n: x.grad for n, x in inputs.items() if x is not None and n in trained}
    return {"y": y.detach(), **found}, saved.num_bytes


def assert_within_own_error(lean, plain, exact, factor=1.5):
    """Compare errors against float64: ours may be larger than plain autograd's by a factor."""
    assert lean.keys() == plain.keys() == exact.keys()
    for name, reference in exact.items():
        assert lean[name].dtype == plain[name].dtype, name
        ours, theirs = ((r[name].double() - reference).norm() for r in (lean, plain))
        scale = reference.norm()
        bound = factor * theirs + torch.finfo(lean[name].dtype).eps * scale
        assert ours <= bound, (name, ours / scale, theirs / scale)


def assert_results_close(ours, theirs, **tolerance):
    assert ours.keys() == theirs.keys()
    for name, expected in theirs.items():
        torch.testing.assert_close(ours[name], expected, msg=name, **tolerance)
