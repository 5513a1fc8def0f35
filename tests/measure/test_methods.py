"""What each method makes of a model."""

import pytest
import torch

from pacatune.measure.methods import adapt
from pacatune.measure.models import loss_of, make_batch, make_model
from pacatune.measure.setting import METHODS
from tests.measure.conftest import HIDDEN, MLP, NUM_LAYERS, RANK, VOCAB

# Of torch, where PEFT's SHiRA makes a sparse tensor.
pytestmark = pytest.mark.filterwarnings("ignore:Sparse invariant checks")
OUT_FEATURES = NUM_LAYERS * (4 * HIDDEN + 2 * MLP + HIDDEN)


def base(values, method, dtype=torch.float32):
    quantization = "nf4" if method.startswith("q") else None
    return make_model(values, dtype, torch.device("cpu"), seed=3, quantization=quantization)


def contender(values, method, dtype=torch.float32):
    options = {"rank": RANK, "dropout": 0.1, "seed": 0, "adapter_dtype": dtype}
    return adapt(base(values, method, dtype), method, **options)


@pytest.mark.parametrize("method", METHODS)
def test_a_method_is_the_base_model_at_first_and_trains_what_it_says_in_its_dtype(values, method):
    batch = make_batch(2, 5, VOCAB, seed=1)
    expected = base(values, method)(input_ids=batch).logits
    actual = contender(values, method).model.eval()(input_ids=batch).logits
    torch.testing.assert_close(actual, expected)
    adapted = contender(values, method, torch.bfloat16)
    trained = [p for p in adapted.model.parameters() if p.requires_grad]
    assert {p.dtype for p in trained} <= {torch.bfloat16}
    assert adapted.num_trainable_parameters == sum(p.numel() for p in trained)
    if "paca" in method:
        assert adapted.num_trainable_parameters == OUT_FEATURES * RANK
    assert (adapted.optimizer is None) == (method == "frozen")


@pytest.mark.parametrize("num_tokens", [5, 80])
def test_the_forms_of_paca_train_alike_and_write_or_never_do(values, num_tokens):
    batch, losses = make_batch(1, num_tokens, VOCAB, seed=1), {}
    for method, is_written in (("paca", True), ("paca-transient", False)):
        one = contender(values, method)
        losses[method] = []
        for _ in range(3):
            loss = loss_of(one.model, batch)
            loss.backward()
            layers = [m for m in one.model.modules() if getattr(m, "residency", None) is not None]
            assert [m.residency.is_written for m in layers] == [is_written] * 7 * NUM_LAYERS
            one.optimizer.step()
            one.optimizer.zero_grad()
            losses[method].append(loss.detach())
    assert losses["paca"][2] < losses["paca"][0]
    torch.testing.assert_close(losses["paca-transient"], losses["paca"])


def test_a_device_without_a_fused_optimizer_gets_the_plain_one(values, monkeypatch):
    plain = torch.optim.AdamW

    def make(parameters, **options):
        if options.pop("fused", False):
            raise RuntimeError("`fused=True` requires all the params to be on supported devices")
        return plain(parameters, **options)

    monkeypatch.setattr(torch.optim, "AdamW", make)
    assert not contender(values, "paca").optimizer.defaults["fused"]
