"""What happens to those who hold a weight, or change it, while the model is used."""

import copy
import io

import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor, nn
from torch.nn import functional as F

from pacatune.residency.watching import WeightParameter
from pacatune.tuner.model import mark_shared_weights
from tests.residency.net import Net, adapt, assert_base, check, deltas, expected, layers


class TestHeldOverAnEvaluation:
    def test_parameters(self, base: Net, x: Tensor) -> None:
        model = adapt(base)
        held = dict(model.named_parameters())
        with torch.no_grad():
            torch.testing.assert_close(model(x), expected_output(base, model, x))
        key = "base_model.model.first.base_layer.weight"
        assert torch.equal(held[key], base.first.weight)
        assert torch.equal(load(save({"w": held[key].detach()}))["w"], base.first.weight)

    def test_a_module_that_has_been_given_the_same_parameter(self, base: Net, x: Tensor) -> None:
        model = adapt(base)
        other = nn.Linear(10, 12).double()
        other.weight = layers(model)[0].base_layer.weight
        with torch.no_grad():
            model(x)
            assert torch.equal(other(x), F.linear(x, base.first.weight, other.bias))

    def test_that_takes_place_after_unloading(self, base: Net, x: Tensor) -> None:
        """Backward of an earlier loss, when the plain model has been handed back."""
        model = adapt(base)
        want = expected(base, model, x)[1]
        trained = deltas(model)
        loss = model(x).square().sum()
        plain = model.unload()
        loss.backward()
        for delta, grad in zip(trained, want[1:], strict=True):
            torch.testing.assert_close(delta.grad, grad)
        assert torch.equal(plain.first.weight, base.first.weight)
        assert torch.equal(plain.second.weight, base.second.weight)
        assert type(plain.first.weight) is nn.Parameter
        buffer = io.BytesIO()
        torch.save(plain.state_dict(), buffer)
        buffer.seek(0)
        assert torch.equal(torch.load(buffer)["first.weight"], base.first.weight)


def call_functionally(model: nn.Module, x: Tensor) -> None:
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    torch.func.functional_call(model, parameters, (x,))


def expected_output(base: Net, model: nn.Module, x: Tensor) -> Tensor:
    with torch.enable_grad():
        return expected(base, model, x)[0]


def test_a_copy_is_unloaded_like_the_original(base: Net, x: Tensor) -> None:
    model = adapt(base)
    model(x)
    plain = copy.deepcopy(model).unload()
    assert type(plain.first.weight) is nn.Parameter
    assert torch.equal(plain.first.weight, base.first.weight)


class TestChanged:
    def test_changed_evaluated_and_put_back(self, base: Net, x: Tensor) -> None:
        model = adapt(base)
        weight = layers(model)[0].base_layer.weight
        with torch.no_grad():
            kept = weight.clone()
            weight.mul_(1.01)
            model(x)
            weight.copy_(kept)
        del weight
        assert_base(base, model)
        check(base, model, x)

    @pytest.mark.parametrize("fused", [False, True])
    def test_an_optimiser_that_decays_every_weight(self, fused: bool, base: Net, x: Tensor) -> None:
        """Gradients of zero on frozen weights: AdamW decays them all the same."""
        model = adapt(base)
        parameters = list(model.parameters())
        optimizer = torch.optim.AdamW(parameters, lr=0.1, weight_decay=0.1, fused=fused)
        for _ in range(3):
            check(base, model, x)
            for parameter in parameters:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
            optimizer.step()
            with torch.no_grad():
                for parameter in base.parameters():
                    parameter.mul_(1 - 0.1 * 0.1)
            for layer, plain in zip(layers(model), (base.first, base.second), strict=True):
                torch.testing.assert_close(layer.base_layer.weight.detach(), plain.weight.detach())

    def test_through_the_data_of_a_held_parameter(self, base: Net, x: Tensor) -> None:
        """As averages and home-made optimisers do; taking `.data` is a look."""
        model = adapt(base)
        held = [layer.base_layer.weight for layer in layers(model)]
        for _ in range(3):
            check(base, model, x)
            assert type(held[0]) is WeightParameter
            for ours, theirs in zip(held, (base.first.weight, base.second.weight), strict=True):
                ours.data.mul_(0.9)
                theirs.data.mul_(0.9)
                assert torch.equal(ours, theirs)
        check(base, model, x)
        for ours, plain in zip(held, (base.first, base.second), strict=True):
            value = torch.randn_like(ours)
            ours.data = value
            plain.weight.data = value.clone()
        check(base, model, x)
        assert_base(base, model)

    def test_asked_for_a_gradient_while_held(self, base: Net, x: Tensor) -> None:
        model = adapt(base)
        weight = layers(model)[0].base_layer.weight
        model(x)
        weight.requires_grad_()
        check(base, model, x)
        assert weight.grad.abs().sum() > 0

    def test_shared_after_it_was_adapted(self, base: Net, x: Tensor) -> None:
        model = adapt(base)
        model(x)
        layer = layers(model)[0]
        other = nn.Linear(10, 12)
        model.base_model.model.other = other
        assert layer.residency.is_written
        dict.__setitem__(other._parameters, "weight", layer.residency.weight)  # without a look
        mark_shared_weights(model.base_model.model)
        assert torch.equal(other.weight, base.first.weight)
        check(base, model, x)
        assert torch.equal(other.weight, base.first.weight)


class TestBetweenForwardAndBackward:
    @pytest.mark.parametrize("few", [True, False])
    def test_hooks_that_copy_what_is_saved(self, few: bool, base: Net) -> None:
        """As activation offloading does: a copy of the weight would be of the wrong state."""
        base.float()
        model = adapt(base)
        sizes = (20, 100) if few else (100, 20)
        first, second = (torch.randn(size, 10) for size in sizes)
        want = expected(base, model, first)[1]
        batch = first.clone().requires_grad_()
        hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), lambda t: t)
        with hooks:
            loss = model(batch).square().sum()
        model(second)
        held = model.state_dict()
        loss.backward()
        for ours, theirs in zip([batch.grad, *(d.grad for d in deltas(model))], want, strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
        assert held

    def test_no_weight_is_saved(self, base: Net, x: Tensor) -> None:
        model = adapt(base)
        saved: list[Tensor] = []
        hooks = torch.autograd.graph.saved_tensors_hooks(saved.append, lambda t: t)
        with hooks:
            model(x.requires_grad_())
        weights = {layer.residency.weight.data_ptr() for layer in layers(model)}
        assert not weights & {t.data_ptr() for t in saved if isinstance(t, Tensor)}

    def test_a_delta_that_was_changed_while_hooks_kept_the_old_one(
        self, base: Net, x: Tensor
    ) -> None:
        model = adapt(base)
        want = expected(base, model, x)[1]
        batch = x.clone().requires_grad_()
        with torch.autograd.graph.allow_mutation_on_saved_tensors():
            loss = model(batch).square().sum()
            with torch.no_grad():
                for delta in deltas(model):
                    delta.add_(1)
            model(x)  # the new columns are in the weight
            loss.backward()
        for ours, theirs in zip([batch.grad, *(d.grad for d in deltas(model))], want, strict=True):
            torch.testing.assert_close(ours, theirs)

    def test_a_base_that_was_changed(self, base: Net, x: Tensor) -> None:
        model = adapt(base)
        loss = model(x.requires_grad_()).square().sum()
        with torch.no_grad():
            layers(model)[1].base_layer.weight.mul_(2)
        with pytest.raises(
            RuntimeError, match=r"whose base weight was changed.*forward pass again"
        ):
            loss.backward()

    @pytest.mark.parametrize("call", ["never", "merged", "unmerged"])
    def test_merged_and_unmerged(self, call: str, base: Net, x: Tensor) -> None:
        """Also where `functional_call` puts other tensors in the weights' place meanwhile."""
        model = adapt(base)
        layers(model)[0].base_layer.load_state_dict(base.first.state_dict())
        model(x)
        model.merge_adapter()
        model.unmerge_adapter()
        want = expected(base, model, x)[1]
        loss = model(x).square().sum()
        model.merge_adapter()
        if call == "merged":
            call_functionally(model, x)
        model.unmerge_adapter()
        if call == "unmerged":
            call_functionally(model, x)
        loss.backward()
        for delta, grad in zip(deltas(model), want[1:], strict=True):
            torch.testing.assert_close(delta.grad, grad)

    def test_changed_while_merged(self, base: Net, x: Tensor) -> None:
        model = adapt(base)
        loss = model(x.requires_grad_()).square().sum()
        model.merge_adapter()
        with torch.no_grad():
            layers(model)[1].base_layer.weight.mul_(2)
        model.unmerge_adapter()
        with pytest.raises(RuntimeError, match="whose base weight was changed"):
            loss.backward()

    def test_a_merged_forward_that_has_been_unmerged_is_refused(self, base: Net, x: Tensor) -> None:
        model = adapt(base)
        model.merge_adapter()
        loss = model(x.requires_grad_()).square().sum()
        model.unmerge_adapter()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()

    def test_a_merge_that_fails_changes_nothing(self, base: Net, x: Tensor) -> None:
        model = adapt(base)
        want = expected(base, model, x)[1]
        loss = model(x).square().sum()
        kept = deltas(model)[1].detach().clone()
        deltas(model)[1].data.fill_(float("nan"))
        for merge in (model.merge_adapter, model.merge_and_unload):
            with pytest.raises(ValueError, match="NaNs detected"):
                merge(safe_merge=True)
            assert [layer.merged_adapters for layer in layers(model)] == [[], []]
            assert_base(base, model)
        deltas(model)[1].data.copy_(kept)
        loss.backward()
        for delta, grad in zip(deltas(model), want[1:], strict=True):
            torch.testing.assert_close(delta.grad, grad)


def test_training_does_not_depend_on_who_looked(base: Net) -> None:
    base.float()
    results = []
    for watch in (False, True):
        model = adapt(base)
        optimizer = torch.optim.AdamW(deltas(model), lr=0.05)
        generator = torch.Generator().manual_seed(3)
        for sizes in [(20,), (20, 20), (100, 20), (20, 100, 20), (20,), (100,)]:
            for size in sizes:
                x = torch.randn(size, 10, generator=generator)
                model(x).square().mean().backward()
                if watch:
                    with torch.no_grad():
                        model(x)
                        model(torch.cat([x] * 10))
                    list(model.parameters())
                    [delta.data.norm() for delta in deltas(model)]
            optimizer.step()
            optimizer.zero_grad()
            if watch:
                model.state_dict()
                with torch.no_grad():
                    model(torch.cat([x] * 10))
        results.append([delta.detach().clone() for delta in deltas(model)])
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


def test_torch_func_leaves_residency_as_it_was(base: Net, x: Tensor) -> None:
    model = adapt(base)
    call_functionally(model, x)
    check(base, model, x)
    assert all(layer.residency.is_written for layer in layers(model))


@pytest.mark.parametrize("through_data", [False, True])
def test_what_the_columns_add_follows_the_base(through_data: bool) -> None:
    """In 16 bits it depends on the weight that the columns are rounded beside."""
    torch.manual_seed(0)
    net = Net().to(torch.bfloat16)
    with torch.no_grad():
        net.first.weight.mul_(100)
    model = adapt(net).eval()
    layer, x = layers(model)[0], torch.randn(5, 10, dtype=torch.bfloat16)
    held = layer.base_layer.weight
    with torch.no_grad():
        model(x)
        (held.data if through_data else held).div_(100)
        found = model(x)
        assert torch.equal(found, copy.deepcopy(model)(x))
