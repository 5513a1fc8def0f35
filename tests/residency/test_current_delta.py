"""R1: every forward and gradient equals plain autograd at the current delta."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from tests.residency.net import Net, adapt, assert_base, check, deltas, expected, layers


class SGDOutsideTorch:
    """An optimiser that torch's step hook cannot see."""

    def __init__(self, parameters: list[nn.Parameter], through_data: bool) -> None:
        self.parameters, self.through_data = parameters, through_data

    def step(self) -> None:
        for parameter in self.parameters:
            if self.through_data:
                parameter.data.add_(parameter.grad, alpha=-0.1)
            else:
                with torch.no_grad():
                    parameter.sub_(0.1 * parameter.grad)


def _step(make: Callable) -> Callable[[nn.Module], None]:
    def change(model: nn.Module) -> None:
        make(deltas(model)).step()

    return change


def _no_grad_maths(model: nn.Module) -> None:
    with torch.no_grad():
        for delta in deltas(model):
            delta.mul_(0.5).add_(0.1)


def _data_edit(model: nn.Module) -> None:
    for delta in deltas(model):
        delta.data.mul_(-1)


def _data_assignment(model: nn.Module) -> None:
    for delta in deltas(model):
        delta.data = torch.randn_like(delta)


def _load_state_dict(model: nn.Module) -> None:
    state = {key: value * 2 for key, value in model.state_dict().items() if "paca_delta" in key}
    model.load_state_dict(state, strict=False)


def _assign_state_dict(model: nn.Module) -> None:
    state = {key: value * 2 for key, value in model.state_dict().items() if "paca_delta" in key}
    model.load_state_dict(state, strict=False, assign=True)


def _swap_state_dict(model: nn.Module) -> None:
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        _load_state_dict(model)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


def _new_columns(model: nn.Module) -> None:
    state = {k: v.clone() for k, v in model.state_dict().items() if "paca_indices" in k}
    for value in state.values():
        value.copy_(torch.tensor([0, 1, 2]))
    model.load_state_dict(state, strict=False)


def _columns_alone(model: nn.Module) -> None:
    for layer in layers(model):
        layer.paca_indices["default"] = torch.tensor([0, 1, 2])


def _columns_in_place(model: nn.Module) -> None:
    for layer in layers(model):
        layer.paca_indices["default"].copy_(torch.tensor([0, 1, 2]))


def _new_scaling(model: nn.Module) -> None:
    for layer in layers(model):
        layer.scale_layer(0.25)


def _new_parameter(model: nn.Module) -> None:
    for layer in layers(model):
        layer.paca_delta["default"].weight = nn.Parameter(
            torch.randn_like(layer.delta_of("default"))
        )


CHANGES: dict[str, Callable[[nn.Module], None]] = {
    "sgd": _step(lambda p: torch.optim.SGD(p, lr=0.1)),
    "adamw fused": _step(lambda p: torch.optim.AdamW(p, lr=0.1, fused=True)),
    "adamw foreach": _step(lambda p: torch.optim.AdamW(p, lr=0.1, foreach=True)),
    "adamw loop": _step(lambda p: torch.optim.AdamW(p, lr=0.1, foreach=False)),
    "outside torch": _step(lambda p: SGDOutsideTorch(p, through_data=False)),
    "outside torch, .data": _step(lambda p: SGDOutsideTorch(p, through_data=True)),
    "in-place maths": _no_grad_maths,
    ".data edit": _data_edit,
    ".data assignment": _data_assignment,
    "load_state_dict": _load_state_dict,
    "load_state_dict(assign=True)": _assign_state_dict,
    "load_state_dict that swaps": _swap_state_dict,
    "other columns": _new_columns,
    "other columns, delta untouched": _columns_alone,
    "other columns in place": _columns_in_place,
    "other scaling": _new_scaling,
    "other parameter": _new_parameter,
}


class TestR1CurrentDelta:
    """Every forward and gradient equals plain autograd at the current delta."""

    @pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
    def test_after_any_change(self, change, base: Net, x: Tensor) -> None:
        model = adapt(base)
        for _ in range(3):
            check(base, model, x)
            change(model)
            y, _ = expected(base, model, x)
            with torch.no_grad():  # evaluation right after, before any training forward
                torch.testing.assert_close(model(x), y)
            check(base, model, x)

    @pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
    def test_after_any_change_that_nobody_looks_beside(self, change, base: Net, x: Tensor) -> None:
        model = adapt(base)
        for _ in range(3):
            model(x).sum().backward()
            change(model)
            torch.testing.assert_close(model(x).detach(), expected(base, model, x)[0])
        assert_base(base, model)

    def test_a_fused_step_between_two_evaluations(self, base: Net, x: Tensor) -> None:
        model = adapt(base)
        optimizer = torch.optim.AdamW(deltas(model), lr=0.1, fused=True)
        for delta in deltas(model):
            delta.grad = torch.ones_like(delta)
        for _ in range(3):
            y, _ = expected(base, model, x)
            with torch.no_grad():
                torch.testing.assert_close(model(x), y)
            optimizer.step()

    def test_edits_through_an_alias_taken_once(self, base: Net, x: Tensor) -> None:
        model = adapt(base)
        aliases = [delta.data for delta in deltas(model)]
        for _ in range(3):
            check(base, model, x)
            for alias in aliases:
                alias.add_(0.1)

    def test_exponential_moving_average_swapped_in_and_out(self, base: Net, x: Tensor) -> None:
        model = adapt(base)
        averages = [delta.detach().clone() * 0.3 for delta in deltas(model)]
        for _ in range(2):
            check(base, model, x)
            kept = [delta.data.clone() for delta in deltas(model)]
            for delta, average in zip(deltas(model), averages, strict=True):
                delta.data.copy_(average)
            check(base, model, x)
            for delta, value in zip(deltas(model), kept, strict=True):
                delta.data.copy_(value)
            check(base, model, x)

    def test_deltas_in_one_flat_buffer(self, base: Net, x: Tensor) -> None:
        """DeepSpeed's ZeRO-1/2: each delta is a view of a buffer that the optimiser updates."""
        model = adapt(base)
        check(base, model, x)
        flat = torch.cat([delta.detach().reshape(-1) for delta in deltas(model)])
        start = 0
        for delta in deltas(model):
            delta.data = flat[start : start + delta.numel()].view_as(delta)
            start += delta.numel()
        for _ in range(3):
            check(base, model, x)
            flat.mul_(0.7)

    @pytest.mark.parametrize("accumulation", [1, 3, 4])
    @pytest.mark.parametrize("checkpointing", [None, "reentrant", "non-reentrant"])
    def test_accumulation_and_checkpointing(
        self, accumulation: int, checkpointing: str | None, base: Net, x: Tensor
    ) -> None:
        model = adapt(base)
        model.base_model.model.checkpointing = checkpointing
        optimizer = torch.optim.AdamW(deltas(model), lr=0.05)
        for step in range(3):
            sums = None
            for micro in range(accumulation):
                batch = (x + micro + step).requires_grad_()
                y, grads = expected(base, model, batch.detach())
                out = model(batch)
                torch.testing.assert_close(out, y)
                out.square().sum().backward()
                torch.testing.assert_close(batch.grad, grads[0])
                sums = (
                    grads[1:]
                    if sums is None
                    else [a + b for a, b in zip(sums, grads[1:], strict=True)]
                )
            for delta, total in zip(deltas(model), sums, strict=True):
                torch.testing.assert_close(delta.grad, total)
            optimizer.step()
            optimizer.zero_grad()

    @pytest.mark.parametrize("tokens", [1, 63, 64, 200])
    def test_few_and_many_tokens_in_float32(self, tokens: int, base: Net) -> None:
        base.float()
        model = adapt(base)
        optimizer = torch.optim.SGD(deltas(model), lr=1e-3)
        for _ in range(3):
            for number in (tokens, 200, tokens):
                x = torch.randn(number, 10)
                y, grads = expected(base, model, x)
                model.zero_grad()
                batch = x.clone().requires_grad_()
                out = model(batch)
                out.square().sum().backward()
                torch.testing.assert_close(out, y, atol=1e-4, rtol=1e-4)
                for ours, theirs in zip(
                    [batch.grad, *(d.grad for d in deltas(model))], grads, strict=True
                ):
                    torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=1e-3)
            optimizer.step()

    @pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
    def test_few_tokens_after_many_and_any_change(self, change, base: Net) -> None:
        base.float()
        model = adapt(base)
        for number in (100, 4):
            x = torch.randn(number, 10)
            y = model(x)
            torch.testing.assert_close(y, expected(base, model, x)[0])
            y.sum().backward()
            change(model)

    def test_few_tokens_forward_then_many_then_both_backward(self, base: Net) -> None:
        base.float()
        model = adapt(base)
        few, many = torch.randn(4, 10), torch.randn(100, 10)
        want = [expected(base, model, batch)[1] for batch in (few, many)]
        first = few.clone().requires_grad_()
        second = many.clone().requires_grad_()
        losses = [model(first).square().sum(), model(second).square().sum()]
        for loss in losses:
            loss.backward()
        torch.testing.assert_close(first.grad, want[0][0], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(second.grad, want[1][0], atol=1e-4, rtol=1e-4)


def test_optimisers_take_their_fast_paths(base: Net, x: Tensor, monkeypatch) -> None:
    """torch decides by exact types whether it may step all parameters in one launch."""
    from torch.optim import optimizer

    model = adapt(base)
    plain = [nn.Parameter(torch.randn(3)) for _ in range(2)]
    on_gpu = ["cpu"]
    monkeypatch.setattr(optimizer, "_get_foreach_kernels_supported_devices", lambda: on_gpu)
    check(base, model, x)
    weights = [layer.base_layer.weight for layer in layers(model)]
    for differentiable in (False, True):
        want = optimizer._default_to_fused_or_foreach(plain, differentiable, use_fused=False)
        for parameters in (deltas(model), weights):
            found = optimizer._default_to_fused_or_foreach(parameters, differentiable, False)
            assert found == want
    assert type(deltas(model)[0]) is not nn.Parameter
