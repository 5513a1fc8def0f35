"""Cross-entropy in chunks, and the logits that stand for it."""

import copy

import pytest
import torch
from torch.nn import functional as F

from benchmarks.gpu_promises import Reads
from pacatune.lean import linear_cross_entropy
from pacatune.lean.loss import LazyLogits, _rows_per_chunk
from tests.lean.twins import assert_within_own_error, run

N, WIDTH, V = 11, 6, 9


def make(dtype=torch.float64, bias=True, ignored=(1, 4, 5)):
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    target = torch.randint(V, (N,), generator=generator)
    target[list(ignored)] = -100
    rows = {"x": normal(N, WIDTH), "weight": normal(V, WIDTH), "bias": normal(V) if bias else None}
    return rows | {"target": target}


def plain(x, weight, target, bias=None, transform=None, **options):
    logits = F.linear(x, weight, bias)
    return F.cross_entropy(logits if transform is None else transform(logits), target, **options)


def cap(logits):
    return torch.tanh(logits.float() / 3.0) * 3.0


def cap_in_place(logits):
    return torch.tanh(logits / 3.0) * 3.0


@pytest.mark.parametrize("options", [{}, {"reduction": "sum"}, {"label_smoothing": 0.2}])
def test_gradcheck(options):
    tensors = make()
    target = tensors.pop("target")
    inputs = tuple(x.requires_grad_() for x in tensors.values())
    assert torch.autograd.gradcheck(
        lambda x, weight, bias: linear_cross_entropy(
            x, weight, target, bias, transform=cap_in_place, chunk_rows=3, **options
        ),
        inputs,
    )


ALL, SOME = {"x", "weight", "bias"}, (1, 4, 5)


@pytest.mark.parametrize(
    ("trained", "ignored", "transform", "dtype"),
    [
        *(
            (ALL, SOME, transform, dtype)
            for transform in (None, torch.Tensor.float, cap)
            for dtype in (torch.float32, torch.bfloat16)
        ),
        *((ALL, ignored, cap, torch.bfloat16) for ignored in [(), tuple(range(10)), range(N)]),
        *(({name}, SOME, None, torch.bfloat16) for name in ALL),
    ],
)
def test_equals_plain(trained, ignored, transform, dtype):
    tensors = make(dtype, ignored=ignored)
    options = {"transform": transform, "reduction": "sum"}
    if len(ignored) < N:  # the mean of nothing is no number
        options = {"transform": transform, "label_smoothing": 0.1}
    ours, _ = run(lambda **x: linear_cross_entropy(**x, chunk_rows=4, **options), tensors, trained)
    theirs, _ = run(lambda **x: plain(**x, **options), tensors, trained)
    wide = {n: x.double() if x.is_floating_point() else x for n, x in tensors.items()}
    options["transform"] = cap_in_place if transform is cap else None
    exact, _ = run(lambda **x: plain(**x, **options), wide, trained)
    assert ours["y"].dtype == theirs["y"].dtype
    assert_within_own_error(ours, theirs, exact)


def test_mean_over_no_rows_is_what_torch_says():
    tensors = make(torch.float32, ignored=range(N))
    ours, _ = run(linear_cross_entropy, tensors, {"x"})
    theirs, _ = run(plain, tensors, {"x"})
    assert ours["y"].isnan()
    assert theirs["y"].isnan()


@pytest.mark.parametrize("chunk_rows", [1, 4, 100, None])
def test_chunks_do_not_matter(chunk_rows):
    tensors = make(torch.float64)
    trained = {"x", "weight", "bias"}
    ours, _ = run(lambda **x: linear_cross_entropy(**x, chunk_rows=chunk_rows), tensors, trained)
    theirs, _ = run(plain, tensors, trained)
    for name, expected in theirs.items():
        torch.testing.assert_close(ours[name], expected)


@pytest.mark.parametrize(
    ("num_words", "num_rows"),
    [(128256, 256), (152064, 128), (262144, 128), (262400, 127), (10**6, 64), (32000, 1024)],
)
def test_chunks_are_whole_tiles_of_a_gemm(num_words, num_rows):
    assert _rows_per_chunk(num_words) == num_rows


def test_a_gpu_is_waited_for_once():
    """Which rows count is read by the host, in the forward pass."""
    tensors = make(torch.float32)
    with Reads() as reads:
        linear_cross_entropy(tensors.pop("x").requires_grad_(), **tensors, chunk_rows=4).backward()
    assert reads.names == ["nonzero"]


def test_autocast():
    tensors = make(torch.float32)
    trained = {"x", "weight", "bias"}
    with torch.autocast("cpu", torch.bfloat16):
        ours, _ = run(lambda **x: linear_cross_entropy(**x, chunk_rows=4), tensors, trained)
        theirs, _ = run(plain, tensors, trained)
    wide = {n: x.double() if x.is_floating_point() else x for n, x in tensors.items()}
    exact, _ = run(plain, wide, trained)
    assert ours["y"].dtype == theirs["y"].dtype
    assert ours["weight"].dtype == torch.float32
    assert_within_own_error(ours, theirs, exact)


def test_bytes_kept():
    """With a frozen head: the gradient of the rows that count, and their places."""
    tensors = make(torch.bfloat16, bias=False)
    _, ours = run(linear_cross_entropy, tensors, {"x"})
    assert ours == 8 * WIDTH * 2 + 8 * 8
    _, theirs = run(lambda **x: plain(**x, transform=torch.Tensor.float), tensors, {"x"})
    assert theirs > N * V * 4


def test_errors():
    tensors = make()
    x, weight, target = tensors["x"], tensors["weight"], tensors["target"]
    for arguments, message in [
        ((x, weight[:, 1:], target), r"`x` must be \(N, I\) and `weight` \(V, I\), got \(11, 6\)"),
        ((x, weight, target[1:]), r"`target` must be \(N=11,\) int64, got \(10,\)"),
        (
            (x, weight, target.int()),
            r"`target` must be \(N=11,\) int64, got \(11,\) of torch.int32",
        ),
    ]:
        with pytest.raises(ValueError, match=message):
            linear_cross_entropy(*arguments)
    with pytest.raises(ValueError, match=r"`reduction` \('none'\) must be 'mean' or 'sum'"):
        linear_cross_entropy(x, weight, target, reduction="none")
    with pytest.raises(ValueError, match=r"`chunk_rows` \(0\) must be at least 1"):
        linear_cross_entropy(x, weight, target, chunk_rows=0)
    with pytest.raises(IndexError, match="out of bounds"):
        linear_cross_entropy(x, weight, target + V)
    loss = linear_cross_entropy(x.requires_grad_(), weight, target)
    with pytest.raises(RuntimeError, match="linear_cross_entropy has no second derivative"):
        torch.autograd.grad(loss, x, create_graph=True)


class Counting(LazyLogits):
    """Says whether the logits were computed."""

    num_computed = 0

    def compute(self):
        Counting.num_computed += self._logits is None
        return super().compute()


@pytest.fixture
def lazy(monkeypatch):
    tensors = make(torch.float32, ignored=())
    x = tensors["x"][:10].reshape(2, 5, WIDTH)
    monkeypatch.setattr(Counting, "num_computed", 0)
    monkeypatch.setattr("pacatune.lean.loss.LazyLogits", Counting)
    logits = F.linear(x, tensors["weight"], tensors["bias"])
    return Counting(x, tensors["weight"], tensors["bias"]), logits, tensors["target"][:10]


LOSSES = {
    "transformers": lambda z, t: F.cross_entropy(z.float().view(-1, V), t),
    "soft cap": lambda z, t: F.cross_entropy((torch.tanh(z / 2.0) * 2.0).reshape(10, V), t),
    "method": lambda z, t: F.cross_entropy((2.0 * z).tanh().view((-1, V)), t, reduction="sum"),
    "shifted": lambda z, t: torch.nn.CrossEntropyLoss(label_smoothing=0.1)(
        z[..., :-1, :].contiguous().view(-1, z.size(-1)), t.view(2, 5)[:, 1:].reshape(-1)
    ),
    "masked": lambda z, t: F.cross_entropy(z[t.view(2, 5) > 3], t[t > 3]),
    "one row": lambda z, t: F.cross_entropy(z[0], t[:5]),
}
OTHERS = {
    "own loss": lambda z, t: -z.log_softmax(-1).view(-1, V).gather(1, t[:, None]).mean(),
    "function": lambda z, t: -torch.log_softmax(z, -1).reshape(10, V).gather(1, t[:, None]).mean(),
    "no reduction": lambda z, t: F.cross_entropy(z.view(-1, V), t, reduction="none").sum(),
    "weights": lambda z, t: F.cross_entropy(z.view(-1, V), t, weight=torch.arange(9.0)),
    "tensor factor": lambda z, t: F.cross_entropy((z * torch.ones(V)).view(-1, V), t),
    "tensor divisor": lambda z, t: F.cross_entropy((z / torch.ones(V)).view(-1, V), t),
    "words": lambda z, t: z[..., :3].sum(),
    "places": lambda z, t: z[torch.tensor([1])].sum(),
    "other view": lambda z, t: z.view(5, 2, V).sum(),
    "sum": lambda z, t: torch.add(z, other=z).sum(),
}


@pytest.mark.parametrize("loss", LOSSES)
def test_losses_in_chunks(loss, lazy):
    stand_in, logits, target = lazy
    torch.testing.assert_close(LOSSES[loss](stand_in, target), LOSSES[loss](logits, target))
    assert Counting.num_computed == 0


@pytest.mark.parametrize("use", OTHERS)
def test_other_uses_compute_the_logits(use, lazy):
    stand_in, logits, target = lazy
    torch.testing.assert_close(OTHERS[use](stand_in, target), OTHERS[use](logits, target))
    assert Counting.num_computed == 1


def test_what_logits_say_of_themselves(lazy):
    stand_in, logits, _ = lazy
    for of in (stand_in, logits):
        assert (of.shape, of.size(), of.size(1), of.dim(), len(of)) == (
            (2, 5, V),
            (2, 5, V),
            5,
            3,
            2,
        )
        assert of.device == torch.device("cpu")
    assert Counting.num_computed == 0
    assert stand_in.dtype == torch.float32
    assert torch.equal(stand_in.detach(), logits)
    assert copy.copy(stand_in).shape == logits.shape
