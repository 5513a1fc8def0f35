"""`residency_report`: which layers train with columns in their weights, why others do not (R5)."""

import pytest
import torch
from peft import get_peft_model
from torch import nn

from pacatune import PacaConfig, residency_report
from tests.tuner.nets import layers

NAMES = ["base_model.model.0", "base_model.model.2"]


def build() -> nn.Module:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8)).double()
    config = PacaConfig(r=2, target_modules=["0", "2"])
    return get_peft_model(base, config, autocast_adapter_dtype=False)


def train(model: nn.Module) -> None:
    x = torch.randn(9, 8, dtype=torch.float64, requires_grad=True)
    model(x).square().sum().backward()


def is_written(model: nn.Module) -> list[bool]:
    return [layer.residency.is_written for layer in layers(model).values()]


def test_resident_layers() -> None:
    model = build()
    assert residency_report(model).additive == {}
    assert str(residency_report(model)) == "resident: 2 layers"
    train(model)
    assert residency_report(model).resident == NAMES
    assert all(is_written(model))  # to ask is not to look


def keep_graph(layer) -> object:
    x = torch.randn(3, 8, dtype=torch.float64, requires_grad=True)
    return nn.functional.linear(x, layer.base_layer.weight)


def view(layer) -> None:
    buffer = torch.stack([layer.base_layer.weight.detach()] * 2)
    layer.base_layer.weight = nn.Parameter(buffer[0], requires_grad=False)


class Foreign(torch.Tensor):
    """A tensor of a class that only its own package knows, as quantised weights are."""


def make_foreign(layer) -> None:
    weight = layer.base_layer.weight.detach().clone().as_subclass(Foreign)
    layer.base_layer._parameters["weight"] = weight


# What is done to the first layer, and kept; and what is then said of it.
SITUATIONS = {
    "somebody holds a tensor in the memory of its weight": lambda layer: (
        layer.base_layer.weight.detach()
    ),
    "its base layer has hooks, or another forward (offloading, patches)": lambda layer: (
        layer.base_layer.register_forward_hook(lambda *call: None)
    ),
    "its adapters are disabled": lambda layer: layer.enable_adapters(False),
    "an adapter is merged into its weight": lambda layer: layer.merge(),
    "its update is not trained": lambda layer: layer.delta_of("default").requires_grad_(False),
    "its weight is trained itself": lambda layer: layer.base_layer.weight.requires_grad_(),
    "somebody holds the `.data` of its update, or that is no plain parameter": lambda layer: (
        layer.delta_of("default").data
    ),
    "an autograd graph holds its weight": keep_graph,
    "its weight is in memory that processes share": lambda layer: (
        layer.base_layer.weight.share_memory_()
    ),
    "its weight is a view into a larger buffer": view,
    "its weight is no plain parameter": make_foreign,
}


@pytest.mark.parametrize("reason", SITUATIONS)
def test_reasons(reason: str) -> None:
    """Each is told, and each is true: a training pass writes the other layer's columns alone."""
    model, twin = build(), build()
    first = layers(model)["0"]
    kept = SITUATIONS[reason](first)
    report = residency_report(model)
    assert report.additive == {reason: NAMES[:1]}
    assert report.resident == NAMES[1:]
    assert str(report).endswith(f"not resident: base_model.model.0: {reason}")
    for each in (model, twin):
        torch.manual_seed(1)
        train(each)
    assert is_written(model) == [False, True]
    gradient, plain = (layers(each)["0"].delta_of("default").grad for each in (model, twin))
    if reason == "its weight is no plain parameter":
        assert first.residency.forbidden  # nor asked for by a compiled graph
    if gradient is not None:
        torch.testing.assert_close(gradient, plain)
    del kept


def test_a_captured_model() -> None:
    model, x = build(), torch.randn(3, 8, dtype=torch.float64)
    kept = torch.export.export(model.base_model.model, (x,), strict=False)
    reason = "a CUDA graph or an exported graph reads its weight"
    assert residency_report(model).additive == {reason: NAMES}
    del kept


def test_several_adapters() -> None:
    model = build()
    model.add_adapter("second", PacaConfig(r=2, target_modules=["0"]))
    model.base_model.set_adapter(["default", "second"])
    report = residency_report(model).to_dict()
    assert report == {"resident": [], "additive": {"2 adapters are active": NAMES}}
    train(model)
    assert not any(is_written(model))


def test_a_tied_weight() -> None:
    base = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    base[1].weight = base[0].weight
    model = get_peft_model(base, PacaConfig(r=2, target_modules=["0"]))
    reason = "another module uses the same weight"
    assert residency_report(model).additive == {reason: NAMES[:1]}


def test_other_kinds_of_layer() -> None:
    base = nn.Sequential(nn.Conv1d(8, 8, 3), nn.Linear(4, 4))
    model = get_peft_model(base, PacaConfig(r=2, target_modules=["0", "1"]))
    (reason,) = residency_report(model).additive
    assert reason.startswith("columns are written into the weights of torch.nn.Linear, not ")
    assert reason.endswith("torch.nn.Conv1d, Conv2d, Conv3d")


def test_what_is_no_module_is_refused() -> None:
    with pytest.raises(TypeError, match=r"`model` is a str; give a torch\.nn\.Module"):
        residency_report("model")
