"""Labels that are read on the host while their model's layers are queued."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pacatune import lean
from pacatune.lean import loss as loss_module
from pacatune.lean.labels import Labels, with_copy
from tests.lean.models import adapted, assert_equal_results, gradients, make_batch

MOVES = {
    "as they are": lambda t: t,
    "transformers": lambda t: F.pad(t, (0, 1), value=-100)[..., 1:].contiguous().view(-1),
    "shifted": lambda t: t[:, 1:].to(t.device).reshape(-1).long(),
    "rows": lambda t: t[1:].flatten().to(torch.int64),
}
OTHERS = {
    "computed": lambda t: t + 1,
    "copied": lambda t: t.clone(),
    "chosen on the device": lambda t: t[t > 3],
    "another dtype": lambda t: t.to(torch.int32),
    "of others": lambda t: torch.cat((t, t)),
}
CHANGES = {
    "themselves": lambda own, before, now: own[0].fill_(-100),
    "as they were": lambda own, before, now: before.fill_(1),
    "targets": lambda own, before, now: now[:2].fill_(-100),
}


def make_labels() -> Tensor:
    labels = torch.arange(12).view(3, 4)
    return labels.masked_fill(labels % 5 == 0, -100)


@pytest.mark.parametrize("moves", MOVES)
def test_moves_are_made_on_the_host(moves):
    labels = make_labels()
    targets = MOVES[moves](with_copy(labels))
    expected = MOVES[moves](labels)
    assert type(targets) is Labels
    assert torch.equal(targets.on_host(), expected)
    assert torch.equal(targets.as_subclass(Tensor), expected)


@pytest.mark.parametrize("others", OTHERS)
def test_anything_else_is_a_plain_tensor(others):
    labels = make_labels()
    result = OTHERS[others](with_copy(labels))
    assert type(result) is Tensor
    assert torch.equal(result, OTHERS[others](labels))


@pytest.mark.parametrize("change", CHANGES)
def test_changes_in_place_are_noticed(change):
    labels = make_labels()
    first = with_copy(labels)
    targets = MOVES["transformers"](first)
    CHANGES[change](first, labels, targets)
    assert targets.on_host() is None


@pytest.mark.parametrize("name", ["Llama", "Gemma 2", "T5"])
def test_a_model_is_not_waited_for(name, monkeypatch):
    """Its labels are copied before its layers run, and nothing is read of what is on the GPU."""
    model, batch, events = adapted(name), make_batch(name), []
    lean.enable(model)
    expected, _ = gradients(model, batch)
    on_host, nonzero = Labels.on_host, loss_module._nonzero

    def read(labels):
        events.append("read")
        return on_host(labels)

    def copied(labels):
        events.append("copied")
        return with_copy(labels)

    def counted(counts):
        events.append("counted")
        return nonzero(counts)

    monkeypatch.setattr("pacatune.lean.modules.is_away", lambda labels: True)
    monkeypatch.setattr("pacatune.lean.modules.with_copy", copied)
    monkeypatch.setattr(Labels, "on_host", read)
    monkeypatch.setattr(loss_module, "_nonzero", counted)
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            module.register_forward_hook(lambda *args: events.append("layers"))
    assert_equal_results(gradients(model, batch)[0], expected)
    assert list(dict.fromkeys(events)) == ["copied", "layers", "read", "counted"]
    assert events.count("read") == events.count("counted") == 1


def test_labels_that_were_changed_are_read_where_they_are():
    labels = make_labels()
    targets = with_copy(labels).view(-1)
    targets[3] = -100
    x, weight = torch.randn(12, 4), torch.randn(20, 4)
    loss = loss_module.linear_cross_entropy(x, weight, targets)
    torch.testing.assert_close(loss, F.cross_entropy(x @ weight.t(), labels.view(-1)))
