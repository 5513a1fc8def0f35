"""R1: every forward and gradient equals plain autograd at the current delta."""

from collections.abc import Callable

import pytest
import torch
from torch import nn

from tests.residency import net

OTHER_COLUMNS = torch.tensor([0, 1, 2])
Change = Callable[[nn.Module], None]


def stepped(optimizer: type[torch.optim.Optimizer], **options) -> Change:
    return lambda model: optimizer(net.deltas(model), lr=0.01, **options).step()


def loaded(name: str, **options) -> Change:
    def change(model: nn.Module) -> None:
        state = {key: value / 2 for key, value in model.state_dict().items() if name in key}
        if name == "paca_indices":
            state = dict.fromkeys(state, OTHER_COLUMNS)
        model.load_state_dict(state, strict=False, **options)

    return change


def swapped(model: nn.Module) -> None:
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        loaded("paca_delta")(model)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


def in_each_layer(change: Callable[[nn.Module, nn.Parameter], object]) -> Change:
    def change_all(model: nn.Module) -> None:
        with torch.no_grad():
            for layer in net.layers(model):
                change(layer, layer.delta_of("default"))

    return change_all


CHANGES: dict[str, Change] = {
    "adamw fused": stepped(torch.optim.AdamW, fused=True),
    "adamw foreach": stepped(torch.optim.AdamW, foreach=True),
    "average through .data": in_each_layer(lambda layer, delta: delta.data.copy_(0.3 * delta)),
    ".data assignment": in_each_layer(
        lambda layer, delta: setattr(delta, "data", torch.randn_like(delta))
    ),
    "load_state_dict": loaded("paca_delta"),
    "load_state_dict(assign=True)": loaded("paca_delta", assign=True),
    "load_state_dict that swaps": swapped,
    "other columns": loaded("paca_indices"),
    "other columns, another tensor": in_each_layer(
        lambda layer, delta: layer.paca_indices.update({"default": OTHER_COLUMNS.clone()})
    ),
    "other columns in place": in_each_layer(
        lambda layer, delta: layer.paca_indices["default"].copy_(OTHER_COLUMNS)
    ),
    "other scaling": in_each_layer(lambda layer, delta: layer.scale_layer(0.25)),
    "other parameter": in_each_layer(
        lambda layer, delta: setattr(
            layer.paca_delta["default"], "weight", nn.Parameter(torch.randn_like(delta))
        )
    ),
}
any_change = pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)


@any_change
def test_after_any_change(change, base, model, x):
    for _ in range(2):
        net.check(base, model, x)
        for _ in range(2):  # the first evaluation comes after training, the second after the first
            change(model)
            net.check_evaluation(base, model, x)
        net.check(base, model, x)


@any_change
def test_after_any_change_that_nobody_looks_beside(change, base, model, x):
    for _ in range(3):
        model(x).sum().backward()
        change(model)
        torch.testing.assert_close(model(x).detach(), net.expected(base, model, x)[0])
    net.assert_base(base, model)


def test_edits_through_an_alias_taken_once(base, model, x):
    aliases = [delta.data for delta in net.deltas(model)]
    for _ in range(3):
        net.check(base, model, x)
        for alias in aliases:
            alias.add_(0.1)


def test_deltas_in_one_flat_buffer(base, model, x):
    """DeepSpeed's ZeRO-1/2: each delta is a view of a buffer that the optimiser updates."""
    net.check(base, model, x)
    flat = torch.cat([delta.detach().reshape(-1) for delta in net.deltas(model)])
    sizes = [delta.numel() for delta in net.deltas(model)]
    for delta, part in zip(net.deltas(model), flat.split(sizes), strict=True):
        delta.data = part.view_as(delta)
    for _ in range(3):
        net.check(base, model, x)
        flat.mul_(0.7)


def test_optimisers_take_their_fast_paths(base, model, x, monkeypatch):
    """torch decides by exact types whether it may step all parameters in one launch."""
    from torch.optim import optimizer

    plain = [nn.Parameter(torch.randn(3)) for _ in range(2)]
    on_gpu = ["cpu"]
    monkeypatch.setattr(optimizer, "_get_foreach_kernels_supported_devices", lambda: on_gpu)
    net.check(base, model, x)
    weights = [layer.base_layer.weight for layer in net.layers(model)]
    for differentiable in (False, True):
        want = optimizer._default_to_fused_or_foreach(plain, differentiable, use_fused=False)
        for parameters in (net.deltas(model), weights):
            found = optimizer._default_to_fused_or_foreach(parameters, differentiable, False)
            assert found == want
    assert type(net.deltas(model)[0]) is not nn.Parameter
