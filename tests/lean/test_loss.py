"""Cross-entropy in chunks, and the logits that stand for it."""

import copy

import pytest
import torch
from torch.nn import functional as F

from pacatune.lean.loss import LazyLogits, _rows_per_chunk, linear_cross_entropy
from tests.lean.functions import CASES, WIDTH, N, V, loss, plain_loss, run
from tests.ops.twin import assert_equal, cast, leaves_of
from tests.reads import Reads

LOSS = CASES["loss"]


def test_mean_over_no_rows_is_what_torch_says():
    tensors = loss(ignored=range(N)).tensors
    assert linear_cross_entropy(**tensors).isnan()
    assert plain_loss(**tensors).isnan()


@pytest.mark.parametrize("chunk_rows", [1, 100, None])
def test_chunks_do_not_matter(chunk_rows):
    tensors, trained = LOSS.tensors, LOSS.floating
    ours, _ = run(lambda **x: linear_cross_entropy(**x, chunk_rows=chunk_rows), tensors, trained)
    theirs, _ = run(LOSS.plain, tensors, trained)
    assert_equal(ours, theirs)


@pytest.mark.parametrize(
    ("num_words", "num_rows"),
    [(128256, 256), (152064, 128), (262144, 128), (262400, 127), (10**6, 64), (32000, 1024)],
)
def test_chunks_are_whole_tiles_of_a_gemm(num_words, num_rows):
    assert _rows_per_chunk(num_words) == num_rows


def test_a_gpu_is_waited_for_once():
    """Which rows count is read by the host, in the forward pass."""
    tensors = leaves_of(LOSS.tensors, {"x"})
    with Reads() as reads:
        linear_cross_entropy(**tensors, chunk_rows=4).backward()
    assert reads.names == ["nonzero"]


class Counting(LazyLogits):
    """Says whether the logits were computed."""

    num_computed = 0

    def compute(self):
        Counting.num_computed += self._logits is None
        return super().compute()


@pytest.fixture
def lazy(monkeypatch):
    tensors = cast(loss(ignored=()).tensors, torch.float32)
    x = tensors["x"][:10].reshape(2, 5, WIDTH)
    monkeypatch.setattr(Counting, "num_computed", 0)
    monkeypatch.setattr("pacatune.lean.loss.LazyLogits", Counting)
    logits = F.linear(x, tensors["weight"], tensors["bias"])
    head = torch.nn.Linear(WIDTH, V)
    head.weight, head.bias = (torch.nn.Parameter(tensors[name]) for name in ("weight", "bias"))
    return Counting(x, head), logits, tensors["target"][:10]


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
        assert of.shape == of.size() == (2, 5, V)
        assert (of.size(1), of.dim(), len(of), of.device.type) == (5, 3, 2, "cpu")
    assert Counting.num_computed == 0
    assert stand_in.dtype == torch.float32
    assert torch.equal(stand_in.detach(), logits)
    assert copy.copy(stand_in).shape == logits.shape
