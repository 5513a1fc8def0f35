"""R4 on a GPU: one launch writes and restores the columns of all weights of one optimiser."""

import copy

import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn

from pacatune import PacaConfig
from tests.residency.net import assert_close, deltas, layers

NUM_LAYERS = 5
OPTIONS = {"target_modules": r"\d", "init_weights": False}


def build() -> nn.Module:
    torch.manual_seed(0)
    base = nn.Sequential(*(nn.Linear(8, 8) for _ in range(NUM_LAYERS))).double()
    return get_peft_model(base, PacaConfig(r=3, **OPTIONS), autocast_adapter_dtype=False)


@pytest.fixture(name="model")
def _model() -> nn.Module:
    return build()


def add_other(model: nn.Module) -> None:
    model.add_adapter("other", PacaConfig(r=2, random_seed=5, **OPTIONS))
    for layer in layers(model):
        layer.paca_delta["other"].double()


def loss_of(model: nn.Module, step: int) -> Tensor:
    x = torch.randn(9, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(step))
    return model(x).square().sum()


def trained(model: nn.Module) -> torch.optim.Optimizer:
    optimizer = torch.optim.AdamW(deltas(model), lr=0.05)
    for step in range(2):
        loss_of(model, step).backward()
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


def weights(model: nn.Module) -> list[Tensor]:
    """Copies, without a look."""
    return [dict.get(m.base_layer._parameters, "weight").detach().clone() for m in layers(model)]


LOOKS = {
    "none": lambda model: None,
    "clip_grad_norm_": lambda model: nn.utils.clip_grad_norm_(model.parameters(), 1e9),
    "zero_grad": lambda model: model.zero_grad(),
    "state_dict": lambda model: model.state_dict(),
}


@pytest.mark.parametrize("looks", LOOKS)
def test_launches_of_a_step(looks, model, launches, writes):
    twin = copy.deepcopy(model)  # of which columns are never in a weight when it steps
    steps = [torch.optim.AdamW(deltas(each), lr=0.05) for each in (model, twin)]
    for number in range(4):
        for each, optimizer in zip((model, twin), steps, strict=True):
            launches.clear()
            writes.clear()
            for _ in range(2):  # micro-batches
                loss_of(each, number).backward()
            if looks == "zero_grad":  # the others come before the step
                optimizer.step()
            LOOKS["state_dict" if each is twin else looks](each)
            counts = list(launches), len(writes) - sum(launches)  # apart
            # One for all, and of a look at one after the other, the first alone and then the rest.
            wanted = ([NUM_LAYERS], 0) if looks == "none" else ([NUM_LAYERS, NUM_LAYERS - 1], 1)
            assert each is twin or number < 2 or counts == wanted
            if looks != "zero_grad":
                optimizer.step()
            optimizer.zero_grad()
    for ours, other in zip(deltas(model), deltas(twin), strict=True):
        assert_close(ours, other)


def test_a_weight_that_somebody_holds_is_left_out(model, launches):
    base = weights(model)
    optimizer = trained(model)
    held = layers(model)[2].base_layer.weight.detach()
    launches.clear()
    loss_of(model, 3).backward()
    assert launches[-1] == NUM_LAYERS - 1
    assert torch.equal(held, base[2])
    optimizer.step()
    list(model.parameters())
    assert all(map(torch.equal, weights(model), base))


def test_a_weight_that_was_changed_is_told_of_by_its_own_look(model, launches):
    trained(model)
    loss_of(model, 3).backward()
    changed = dict.get(layers(model)[3].base_layer._parameters, "weight")
    with torch.no_grad():
        changed.mul_(2)
    found = layers(model)
    for layer in found[:3]:
        layer.base_layer.weight  # noqa: B018
    with pytest.raises(RuntimeError, match="was changed in place while its adapted columns were"):
        found[3].base_layer.weight  # noqa: B018
    found[4].base_layer.weight  # noqa: B018


def test_deltas_that_are_not_trained_now_wait(model, launches):
    optimizer = trained(model)
    frozen = deltas(model)[4]
    frozen.requires_grad_(False)
    launches.clear()
    loss_of(model, 3).backward()
    assert launches == [NUM_LAYERS - 1]
    optimizer.step()


def test_another_adapter_does_not_get_the_columns_of_the_first(model, launches):
    base = weights(model)
    trained(model)
    add_other(model)
    model.set_adapter("other")
    twin = copy.deepcopy(model)
    loss, want = loss_of(model, 7), loss_of(twin, 7)
    torch.testing.assert_close(loss, want)
    loss.backward()
    want.backward()
    for ours, other in zip(deltas(model, "other"), deltas(twin, "other"), strict=True):
        torch.testing.assert_close(ours.grad, other.grad)
    list(model.parameters())
    assert all(map(torch.equal, weights(model), base))


def test_two_adapters_of_one_optimizer_are_one_member(model, launches):
    """Each weight is written once for all, with the columns of the adapter that is trained now."""
    add_other(model)
    optimizer = torch.optim.SGD(deltas(model) + deltas(model, "other"), lr=0.01)
    for step in range(4):
        name = "other" if step % 2 else "default"
        model.set_adapter(name)
        loss_of(model, step).backward()
        optimizer.step()
    launches.clear()
    loss_of(model, 5).backward()
    assert launches == [NUM_LAYERS]
    assert all(layer.residency.is_written for layer in layers(model))


def test_a_weight_is_read_again_where_its_changes_may_go_unnoticed(model):
    """On a CPU after any look, for numpy; elsewhere after a use of `.data`."""
    trained(model)
    layer = layers(model)[1]
    with torch.no_grad():
        layer.base_layer.weight.numpy()[:] *= 2
    list(model.parameters())
    base = weights(model)
    loss_of(model, 3).backward()
    list(model.parameters())
    assert all(map(torch.equal, weights(model), base))


def test_a_model_that_is_gone_is_no_member(launches):
    first, second = build(), build()
    optimizer = torch.optim.SGD(deltas(first) + deltas(second), lr=0.01)
    for _ in range(2):
        loss_of(first, 0).backward()
        loss_of(second, 0).backward()
        optimizer.step()
    del second
    launches.clear()
    loss_of(first, 1).backward()
    assert launches == [NUM_LAYERS]


@pytest.mark.parametrize("what", ["disable", "set_adapter", "evaluation"])
def test_what_restores_every_weight_is_one_launch(what, model, launches, writes):
    """A preference loss without a reference model switches adapters off in each micro-batch.

    PEFT's `disable_adapter` looks at all parameters before: two launches, see above.
    """
    base = weights(model)
    optimizer = trained(model)
    add_other(model)
    for _ in range(2):
        loss_of(model, 3).backward()
        if what == "evaluation":  # of columns that a step has made old
            optimizer.step()
        launches.clear()
        writes.clear()
        with torch.no_grad():
            if what == "disable":
                model.base_model.disable_adapter_layers()
            if what == "set_adapter":
                model.set_adapter("other")
            loss_of(model, 4)
            assert all(map(torch.equal, weights(model), base))
        assert (launches, len(writes)) == ([NUM_LAYERS], NUM_LAYERS)
        model.base_model.enable_adapter_layers()
        model.set_adapter("default")
