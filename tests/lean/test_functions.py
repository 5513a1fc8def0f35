"""Every lean function beside plain autograd: gradients, the error of 16 bits, bytes kept."""

import pytest
import torch

from tests.lean.functions import CASES, FORMS, B, D, H, K, T, attention, gated, run
from tests.ops.twin import assert_equal, assert_within_own_error, cast, leaves_of

FIRST = ["attention, causal", "product, silu", "rms_norm, llama", "layer_norm of (5, 8)", "loss"]
every_case = pytest.mark.parametrize("name", CASES)


def compare(case, tensors):
    """Hold the error to that of plain autograd in the same dtypes; return the results of both."""
    ours, theirs = (run(f, tensors, case.floating)[0] for f in (case.function, case.plain))
    exact, _ = run(case.plain, cast(tensors, torch.float64), case.floating)
    assert_within_own_error(ours, theirs, exact)
    return ours, theirs


@every_case
def test_gradcheck(name):
    case = CASES[name]
    inputs = leaves_of(case.tensors, case.floating)
    names = sorted(case.floating)

    def function(*given):
        return case.function(**inputs | dict(zip(names, given, strict=True)))

    assert torch.autograd.gradcheck(function, tuple(inputs[n] for n in names), fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@every_case
def test_error_is_that_of_plain_autograd(name, dtype):
    case = CASES[name]
    ours, theirs = compare(case, cast(case.tensors, dtype))
    assert "loss" in name or torch.equal(ours["y"], theirs["y"])


@pytest.mark.parametrize("name", FIRST)
def test_gradients_of_some_inputs(name):
    case = CASES[name]
    for trained in [*({one} for one in case.floating), {"key", "value"} & case.floating]:
        ours, _ = run(case.function, case.tensors, trained)
        theirs, _ = run(case.plain, case.tensors, trained)
        assert_equal(ours, theirs)


@pytest.mark.parametrize(
    ("name", "narrow"),
    [
        *((f"rms_norm, {form}", "x") for form in FORMS),
        ("product, silu", "gate"),
    ],
)
def test_two_dtypes(name, narrow):
    case = CASES[name]
    tensors = cast(case.tensors, torch.float32)
    tensors[narrow] = tensors[narrow].bfloat16()
    compare(case, tensors)


@pytest.mark.parametrize("name", ["attention, causal", "loss"])
def test_autocast(name):
    case = CASES[name]
    tensors = cast(case.tensors, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        ours, kept = run(case.function, tensors, case.floating)
        theirs, kept_plain = run(case.plain, tensors, case.floating)
    exact, _ = run(case.plain, cast(tensors, torch.float64), case.floating)
    assert_within_own_error(ours, theirs, exact)
    assert kept < kept_plain


ROWS = 6 * 8 * 2  # of norms
HEADS, SUMS = B * T * D * 2, B * H * T * 4


@pytest.mark.parametrize(
    ("name", "trained", "num_bytes"),
    [
        ("attention, causal", {"query", "key", "value"}, (2 * H + 2 * K) * HEADS + SUMS),
        *(
            (f"product, {name}", {"gate", "up"}, 2 * 5 * 6 * 2)
            for name in ("silu", "gelu", "gelu_pytorch_tanh", "relu2")
        ),
        ("rms_norm, llama", {"x"}, ROWS + 8 * 2 + 6 * 4),
        ("rms_norm, llama", {"x", "weight"}, ROWS + 8 * 2 + 6 * 4),
        ("layer_norm of (2, 3, 8)", {"x"}, ROWS + 8 * 2 + 2 * 6 * 4),
        # The gradient of the rows that count, and their places.
        ("loss, no bias", {"x"}, 8 * 6 * 2 + 8 * 8),
        *((name, set(), 0) for name in FIRST),
    ],
)
def test_bytes_kept(name, trained, num_bytes):
    case = CASES[name]
    tensors = cast(case.tensors, torch.bfloat16)
    _, kept = run(case.function, tensors, trained)
    _, kept_plain = run(case.plain, tensors, trained)
    assert kept == num_bytes
    assert kept < kept_plain or not trained


def test_silu_gives_the_very_gradients_of_autograd():
    case = gated("silu", (40, 64))
    ours, theirs = compare(case, cast(case.tensors, torch.bfloat16))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_dropout_is_the_same_in_both_directions():
    case = attention("bool", dropout=0.5)
    tensors = cast(case.tensors, torch.float32)
    ours, theirs = (run(f, tensors, case.floating)[0] for f in (case.function, case.plain))
    assert_equal(ours, theirs)


@pytest.mark.parametrize("name", FIRST)
def test_retained_graphs_and_what_is_refused(name):
    case = CASES[name]
    inputs = leaves_of(case.tensors, case.floating)
    trained = [inputs[n] for n in case.floating]
    y = case.function(**{n: x if x.dtype == torch.int64 else 1 * x for n, x in inputs.items()})
    first, second = (torch.autograd.grad(y.sum(), trained, retain_graph=True) for _ in range(2))
    assert all(map(torch.equal, first, second))
    with pytest.raises(RuntimeError, match="has no second derivative"):
        torch.autograd.grad(y.sum(), trained, create_graph=True)
