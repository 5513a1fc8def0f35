"""R5: what must not be written is not written, and the numbers stay right."""

import copy

import torch
from peft import get_peft_model
from torch import Tensor, nn

from pacatune import PacaConfig
from tests.residency.net import Net, adapt, check, expected, layers


class TestR5FallBackOrRaise:
    """What must not be written is not written, and the numbers stay right."""

    def test_hooks_on_the_base_layer_run(self, base: Net, x: Tensor, writes: list[int]) -> None:
        model = adapt(base)
        seen = []
        for layer in layers(model):
            layer.base_layer.register_forward_hook(lambda *args: seen.append(1))
        check(base, model, x)
        assert len(seen) == 2
        assert not writes

    def test_accelerate_offload(self, base: Net, x: Tensor, writes: list[int]) -> None:
        from accelerate.hooks import AlignDevicesHook, add_hook_to_module

        model = adapt(base)
        for layer in layers(model):
            hook = AlignDevicesHook(execution_device="cpu", offload=True)
            add_hook_to_module(layer.base_layer, hook)
            assert layer.base_layer.weight.is_meta
        torch.testing.assert_close(model(x), expected(base, model, x)[0])
        assert not writes

    def test_two_active_adapters_add_up(self, base: Net, x: Tensor, writes: list[int]) -> None:
        model = adapt(base)
        model.add_adapter("other", PacaConfig(r=4, target_modules=["first"], random_seed=3))
        model.base_model.set_adapter(["default", "other"])
        layer = model.base_model.model.first
        layer.delta_of("other").data.normal_()
        weight = base.first.weight + sum(layer.get_delta_weight(name) for name in layer.r)
        y = nn.functional.linear(x, weight, base.first.bias)
        torch.testing.assert_close(layer(x), y)
        model(x).sum().backward()
        assert layer.delta_of("default").grad.abs().sum() > 0
        assert layer.delta_of("other").grad.abs().sum() > 0
        assert not writes

    def test_tied_weights_are_not_written(self, x: Tensor, writes: list[int]) -> None:
        class Tied(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.embed = nn.Embedding(20, 10)
                self.head = nn.Linear(10, 20, bias=False)
                self.head.weight = self.embed.weight

            def forward(self, tokens: Tensor) -> Tensor:
                return self.head(self.embed(tokens))

        base = Tied().double()
        tokens = torch.arange(20)
        model = get_peft_model(copy.deepcopy(base), PacaConfig(r=3, target_modules=["head"]))
        layer = model.base_model.model.head
        layer.delta_of("default").data.normal_()
        optimizer = torch.optim.SGD([layer.delta_of("default")], lr=0.1)
        for _ in range(3):
            y = base.embed(tokens) @ (base.head.weight + layer.get_delta_weight("default")).T
            torch.testing.assert_close(model(tokens), y)
            model(tokens).square().sum().backward()
            optimizer.step()
            assert torch.equal(model.base_model.model.embed.weight, base.embed.weight)
        assert not writes
        y = model(tokens)
        model.merge_adapter()
        assert torch.equal(model.base_model.model.embed.weight, base.embed.weight)
        torch.testing.assert_close(model(tokens), y)
        model.unmerge_adapter()
        assert model.base_model.model.embed.weight is layer.base_layer.weight

    def test_a_trained_base_weight(self, base: Net, x: Tensor, writes: list[int]) -> None:
        model = adapt(base)
        layer = model.base_model.model.first
        layer.base_layer.weight.requires_grad_()
        check(base, model, x)
        assert layer.base_layer.weight.grad.abs().sum() > 0
        assert layer.base_layer.weight.data_ptr() not in writes

    def test_weights_inside_one_flat_buffer(self, base: Net, x: Tensor, writes: list[int]) -> None:
        """FSDP1: each weight is a view of a flat parameter."""
        model = adapt(base)
        inner = [layer.base_layer for layer in layers(model)]
        flat = torch.cat([module.weight.detach().reshape(-1) for module in inner])
        start = 0
        for module in inner:
            view = flat[start : start + module.weight.numel()].view_as(module.weight)
            start += module.weight.numel()
            module.weight = nn.Parameter(view, requires_grad=False)
        check(base, model, x)
        assert not writes

    def test_replicas_of_data_parallel_do_not_write_the_original(
        self, base: Net, x: Tensor, writes: list[int]
    ) -> None:
        layer = adapt(base).base_model.model.first
        layer(x)
        writes.clear()
        replica = layer._replicate_for_data_parallel()
        inner = layer.base_layer._replicate_for_data_parallel()
        inner.weight, inner.bias = base.first.weight.detach().clone(), base.first.bias
        replica._modules["base_layer"] = inner
        torch.testing.assert_close(replica(x), layer(x))
        assert not [w for w in writes if w != layer.base_layer.weight.data_ptr()]
