"""`residency_report`: which layers train with columns in their weights, and why others do not."""

import pytest
import torch
from peft import get_peft_model
from torch import nn

from pacatune import PacaConfig, residency_report
from tests.tuner.small_llama import paca_layers


def build(**options) -> nn.Module:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8)).double()
    options = {"r": 2, "target_modules": ["0", "2"], **options}
    return get_peft_model(base, PacaConfig(**options), autocast_adapter_dtype=False)


def train(model: nn.Module) -> None:
    x = torch.randn(9, 8, dtype=torch.float64, requires_grad=True)
    model(x).square().sum().backward()


def is_written(model: nn.Module) -> list[bool]:
    return [layer.residency.is_written for layer in paca_layers(model)]


def test_resident_layers() -> None:
    model = build()
    assert residency_report(model).additive == {}
    assert str(residency_report(model)) == "resident: 2 layers"
    train(model)
    assert residency_report(model).resident == ["base_model.model.0", "base_model.model.2"]
    assert all(is_written(model))  # to ask is not to look


def hold(model: nn.Module) -> object:
    return paca_layers(model)[0].base_layer.weight.detach()


def hook(model: nn.Module) -> object:
    return paca_layers(model)[0].base_layer.register_forward_hook(lambda *call: None)


def disable(model: nn.Module) -> object:
    return paca_layers(model)[0].enable_adapters(False)


def merge(model: nn.Module) -> object:
    return paca_layers(model)[0].merge()


def freeze(model: nn.Module) -> object:
    return paca_layers(model)[0].delta_of("default").requires_grad_(False)


def unfreeze(model: nn.Module) -> object:
    return paca_layers(model)[0].base_layer.weight.requires_grad_()


def hold_delta(model: nn.Module) -> object:
    return paca_layers(model)[0].delta_of("default").data


def keep_graph(model: nn.Module) -> object:
    x = torch.randn(3, 8, dtype=torch.float64, requires_grad=True)
    return nn.functional.linear(x, paca_layers(model)[0].base_layer.weight)


def share(model: nn.Module) -> object:
    return paca_layers(model)[0].base_layer.weight.share_memory_()


def view(model: nn.Module) -> object:
    layer = paca_layers(model)[0].base_layer
    buffer = torch.zeros(2, 8, 8, dtype=torch.float64)
    layer.weight = nn.Parameter(buffer[0], requires_grad=False)
    return None


def capture(model: nn.Module) -> object:
    return torch.export.export(
        model.base_model.model, (torch.randn(3, 8, dtype=torch.float64),), strict=False
    )


def add_second(model: nn.Module) -> object:
    model.add_adapter("second", PacaConfig(r=2, target_modules=["0"]))
    return model.base_model.set_adapter(["default", "second"])


REASONS = {
    hold: "somebody holds a tensor in the memory of its weight",
    hook: "its base layer has hooks, or another forward (offloading, patches)",
    disable: "its adapters are disabled",
    merge: "an adapter is merged into its weight",
    freeze: "its update is not trained",
    unfreeze: "its weight is trained itself",
    hold_delta: "somebody holds the `.data` of its update, or that is no plain parameter",
    keep_graph: "an autograd graph holds its weight",
    share: "its weight is in memory that processes share",
    view: "its weight is a view into a larger buffer",
}


@pytest.mark.parametrize("situation", REASONS, ids=lambda situation: situation.__name__)
def test_reasons(situation) -> None:
    """Each is told, and each is true: a training pass writes the other layer's columns alone."""
    model = build()
    kept = situation(model)
    report = residency_report(model)
    assert report.additive == {REASONS[situation]: ["base_model.model.0"]}
    assert report.resident == ["base_model.model.2"]
    assert str(report).endswith(f"not resident: base_model.model.0: {REASONS[situation]}")
    train(model)
    assert is_written(model) == [False, True]
    del kept


def test_a_captured_model() -> None:
    model = build()
    kept = capture(model)
    reason = "a CUDA graph or an exported graph reads its weight"
    assert list(residency_report(model).additive) == [reason]
    del kept


def test_several_adapters() -> None:
    model = build()
    add_second(model)
    report = residency_report(model).to_dict()
    names = ["base_model.model.0", "base_model.model.2"]
    assert report == {"resident": [], "additive": {"2 adapters are active": names}}


def test_a_tied_weight() -> None:
    first, second = nn.Linear(8, 8), nn.Linear(8, 8)
    second.weight = first.weight
    config = PacaConfig(r=2, target_modules=["0"])
    model = get_peft_model(nn.Sequential(first, second), config)
    reason = "another module uses the same weight"
    assert residency_report(model).additive == {reason: ["base_model.model.0"]}


class Foreign(torch.Tensor):
    """A tensor of a class that only its own package knows, as quantised weights are."""


def test_a_weight_of_another_class() -> None:
    """It is neither written nor, in a compiled graph, asked for."""
    model = build()
    layer, reference = paca_layers(model)[0], build()
    foreign = layer.base_layer.weight.detach().clone().as_subclass(Foreign)
    layer.base_layer._parameters["weight"] = foreign
    report = residency_report(model)
    assert report.additive == {"its weight is no plain parameter": ["base_model.model.0"]}
    assert layer.residency.forbidden
    for each in (model, reference):
        torch.manual_seed(1)
        train(each)
    assert is_written(model) == [False, True]
    for ours, theirs in zip(paca_layers(model), paca_layers(reference), strict=True):
        want = theirs.delta_of("default").grad
        torch.testing.assert_close(ours.delta_of("default").grad, want)


def test_other_kinds_of_layer() -> None:
    base = nn.Sequential(nn.Conv1d(8, 8, 3), nn.Linear(4, 4))
    model = get_peft_model(base, PacaConfig(r=2, target_modules=["0", "1"]))
    (reason,) = residency_report(model).additive
    assert reason.startswith("columns are written into the weights of torch.nn.Linear, not ")
    assert reason.endswith("torch.nn.Conv1d, Conv2d, Conv3d")


def test_what_is_no_module_is_refused() -> None:
    with pytest.raises(TypeError, match=r"`model` is a str; give a torch\.nn\.Module"):
        residency_report("model")
