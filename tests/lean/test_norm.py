"""RMSNorm and LayerNorm that keep their input as it came."""

import pytest
import torch
from torch.nn import functional as F

from pacatune.lean import layer_norm, rms_norm
from tests.lean.twins import assert_within_own_error, run

SHAPES = [(8,), (5, 8), (2, 3, 8), (0, 8)]
FORMS = {
    "llama": {"plus_one": False, "rounds_first": True},
    "gemma": {"plus_one": True, "rounds_first": False},
    "olmo2": {"plus_one": False, "rounds_first": False},
}


def plain_rms(x, weight, form, wide=torch.float32):
    """As transformers write it."""
    hidden = x.to(wide)
    hidden = hidden * torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + 1e-6)
    if form == "llama":
        hidden = hidden.to(x.dtype)
        return hidden if weight is None else weight * hidden
    if weight is not None:
        hidden = hidden * (1.0 + weight.to(wide) if form == "gemma" else weight)
    return hidden.to(x.dtype)


def plain_layer(x, weight, bias, wide=torch.float32):
    weight, bias = (None if p is None else p.to(wide) for p in (weight, bias))
    return F.layer_norm(x.to(wide), x.shape[-1:], weight, bias, 1e-5).to(x.dtype)


def make(shape, dtype=torch.float64, weight=True, bias=False, weight_dtype=None):
    generator = torch.Generator().manual_seed(0)
    x, row, other = (
        torch.randn(size, generator=generator, dtype=torch.float64)
        for size in (shape, shape[-1:], shape[-1:])
    )
    weight_dtype = weight_dtype or dtype
    tensors = {"x": x.to(dtype), "weight": row.to(weight_dtype) if weight else None}
    return tensors | ({"bias": other.to(weight_dtype)} if bias else {})


@pytest.mark.parametrize("form", FORMS)
def test_gradcheck_rms(form):
    tensors = {name: x.requires_grad_() for name, x in make((2, 3, 8)).items()}
    assert torch.autograd.gradcheck(
        lambda x, weight: rms_norm(x, weight, **FORMS[form]), tuple(tensors.values())
    )


def test_gradcheck_layer():
    tensors = {name: x.requires_grad_() for name, x in make((2, 3, 8), bias=True).items()}
    assert torch.autograd.gradcheck(layer_norm, tuple(tensors.values()))


WIDE, SHORT = torch.float32, torch.bfloat16


@pytest.mark.parametrize(
    ("form", "shape", "trained", "dtypes"),
    [
        *(
            (form, (2, 3, 8), {"x", "weight"}, dtypes)
            for form in FORMS
            for dtypes in ((WIDE, WIDE), (SHORT, SHORT), (SHORT, WIDE))
        ),
        *(("llama", shape, {"x", "weight"}, (WIDE, WIDE)) for shape in SHAPES),
        *((form, (5, 8), {name}, (SHORT, SHORT)) for form in FORMS for name in ("x", "weight")),
    ],
)
def test_rms_equals_plain(form, shape, trained, dtypes):
    tensors = make(shape, dtypes[0], weight_dtype=dtypes[1])
    ours, _ = run(lambda **x: rms_norm(**x, **FORMS[form]), tensors, trained)
    theirs, _ = run(lambda **x: plain_rms(**x, form=form), tensors, trained)
    wide = {name: x.double() for name, x in tensors.items()}
    exact, _ = run(lambda **x: plain_rms(**x, form=form, wide=torch.float64), wide, trained)
    assert torch.equal(ours["y"], theirs["y"])
    assert ours["y"].dtype == theirs["y"].dtype
    assert_within_own_error(ours, theirs, exact)


@pytest.mark.parametrize("form", FORMS)
def test_rms_without_weight(form):
    tensors = make((5, 8), torch.bfloat16, weight=False)
    ours, _ = run(lambda **x: rms_norm(**x, **FORMS[form]), tensors, {"x"})
    theirs, _ = run(lambda **x: plain_rms(**x, form=form), tensors, {"x"})
    assert torch.equal(ours["y"], theirs["y"])
    torch.testing.assert_close(ours["x"], theirs["x"], atol=0.02, rtol=0.02)


@pytest.mark.parametrize(
    ("shape", "trained", "dtype"),
    [
        *((shape, {"x", "weight", "bias"}, SHORT) for shape in SHAPES),
        *(((5, 8), {name}, WIDE) for name in ("x", "weight", "bias")),
    ],
)
def test_layer_equals_plain(shape, trained, dtype):
    tensors = make(shape, dtype, bias=True)
    ours, _ = run(layer_norm, tensors, trained)
    theirs, _ = run(plain_layer, tensors, trained)
    assert torch.equal(ours["y"], theirs["y"])
    for name in trained:
        torch.testing.assert_close(ours[name], theirs[name])


def test_bytes_kept():
    tensors = make((10, 8), torch.bfloat16)
    rows, row = 10 * 8 * 2, 8 * 2
    for trained in ({"x"}, {"x", "weight"}):
        _, ours = run(rms_norm, tensors, trained)
        assert ours == rows + row + 10 * 4
    _, ours = run(layer_norm, make((10, 8), torch.bfloat16, bias=True), {"x"})
    assert ours == rows + row + 2 * 10 * 4
    _, theirs = run(lambda **x: plain_rms(**x, form="llama"), tensors, {"x"})
    assert theirs >= 2 * rows


def test_errors():
    x = torch.randn(3, 8, requires_grad=True)
    with pytest.raises(ValueError, match=r"must be \(I=8,\) to fit `x` \(3, 8\), got shape \(7,\)"):
        rms_norm(x, torch.ones(7))
    with pytest.raises(ValueError, match=r"must be \(I=8,\)"):
        layer_norm(x, torch.ones(8), torch.ones(9))
    with pytest.raises(RuntimeError, match="rms_norm and layer_norm has no second derivative"):
        torch.autograd.grad(rms_norm(x, torch.ones(8)).sum(), x, create_graph=True)
