"""R2: whoever looks at the base sees the base, bit for bit."""

import copy
import gc
import operator
import pickle
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import pacatune.residency.put
from pacatune import PacaConfig
from pacatune.residency.watching import DeltaParameter
from tests.residency.looks import LOOKS, assert_sees_base
from tests.residency.net import Net, adapt, assert_base, check, deltas, layers

COPIES: dict[str, Callable[[dict[str, Tensor]], dict[str, Tensor]]] = {
    "dict": dict,
    "dict with more": lambda parameters: dict(parameters, other=None),
    "**": lambda parameters: {**parameters},
    "keywords": lambda parameters: (lambda **given: given)(**parameters),
    "|": lambda parameters: parameters | {},
    "{} |": lambda parameters: {} | parameters,
    "|=": lambda parameters: operator.ior({}, parameters),
    "dict.copy": dict.copy,
    "copy": copy.copy,
    "setdefault": lambda parameters: {"weight": parameters.setdefault("weight")},
    "popitem": lambda parameters: dict(parameters.popitem() for _ in range(2)),
}


class TestR2TheBaseForWhoeverLooks:
    """Whoever looks at the base sees the base, bit for bit."""

    @pytest.mark.parametrize("look", LOOKS.values(), ids=LOOKS)
    def test_in_the_middle_of_accumulation(self, look, base: Net, x: Tensor) -> None:
        model = adapt(base)
        model(x).sum().backward()
        assert all(layer.residency.is_written for layer in layers(model))
        assert_sees_base(base, look(model))
        model(x).sum().backward()
        assert_sees_base(base, look(model))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    def test_in_every_dtype(self, dtype: torch.dtype, base: Net) -> None:
        base.to(dtype)
        model = adapt(base)
        optimizer = torch.optim.SGD(deltas(model), lr=0.1)
        for _ in range(20):
            model(torch.randn(64, 10, dtype=dtype)).square().mean().backward()
            optimizer.step()
            assert_base(base, model)

    @pytest.mark.parametrize("copies", COPIES.values(), ids=COPIES)
    def test_in_any_copy_of_the_parameters(self, copies, base: Net, x: Tensor) -> None:
        model = adapt(base)
        model(x).sum().backward()
        parameters = layers(model)[0].base_layer._parameters
        assert torch.equal(copies(parameters)["weight"], base.first.weight)

    def test_a_reference_held_over_an_optimiser_step(self, base: Net, x: Tensor) -> None:
        model = adapt(base)
        held = [layer.base_layer.weight for layer in layers(model)]
        optimizer = torch.optim.SGD(deltas(model), lr=0.1)
        for _ in range(3):
            model(x).sum().backward()
            optimizer.step()
            assert torch.equal(held[0], base.first.weight)
            assert torch.equal(held[1], base.second.weight)

    def test_values_of_a_state_dict_held_over_training(self, base: Net, x: Tensor) -> None:
        model = adapt(base)
        held = model.state_dict()
        optimizer = torch.optim.SGD(deltas(model), lr=0.1)
        for _ in range(2):
            check(base, model, x)
            assert_sees_base(base, held)
            optimizer.step()

    def test_inside_disable_adapter(self, base: Net, x: Tensor) -> None:
        model = adapt(base)
        held = [layer.base_layer.weight for layer in layers(model)]
        model(x)
        with model.disable_adapter():
            assert torch.equal(held[0], base.first.weight)
            assert torch.equal(model(x), base(x))
        check(base, model, x)

    def test_after_unload_merge_and_unmerge(self, base: Net, x: Tensor) -> None:
        model = adapt(base)
        y = model(x)
        model.merge_adapter()
        assert torch.equal(model(x), y)
        model.unmerge_adapter()
        assert_base(base, model)
        check(base, model, x)
        plain = model.unload()
        assert type(plain.first) is nn.Linear
        assert type(plain.first._parameters) is dict
        assert torch.equal(plain.first.weight, base.first.weight)
        assert torch.equal(plain(x), base(x))

    def test_merge_and_unload_equals_the_adapted_model(self, base: Net, x: Tensor) -> None:
        model = adapt(base)
        y = model(x)
        assert torch.equal(model.merge_and_unload(safe_merge=True)(x), y)

    def test_after_switching_and_deleting(self, base: Net, x: Tensor) -> None:
        model = adapt(base)
        model.add_adapter(
            "other", PacaConfig(r=4, target_modules=["first", "second"], random_seed=7)
        )
        for delta in deltas(model, "other"):
            delta.data.normal_()
        for adapter in ("other", "default", "other"):
            model.set_adapter(adapter)
            assert_base(base, model)
            check(base, model, x, adapter)
        model.set_adapter("default")
        model.delete_adapter("other")
        assert_base(base, model)
        check(base, model, x)

    def test_after_an_exception_anywhere(self, base: Net, x: Tensor) -> None:
        model = adapt(base)

        def fail(*args: object) -> None:
            raise RuntimeError("out of memory")

        handle = layers(model)[1].register_forward_pre_hook(fail)
        with pytest.raises(RuntimeError, match="out of memory"):
            model(x)
        handle.remove()
        assert_base(base, model)
        loss = model(x).square().sum()
        loss.register_hook(fail)
        with pytest.raises(RuntimeError, match="out of memory"):
            loss.backward()
        assert_base(base, model)
        check(base, model, x)

    def test_interrupted_while_writing(
        self, base: Net, x: Tensor, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        model = adapt(base)
        original = pacatune.residency.put.put_columns_

        def interrupted(*args: Tensor) -> None:
            original(*args)
            raise KeyboardInterrupt

        monkeypatch.setattr(pacatune.residency.put, "put_columns_", interrupted)
        with pytest.raises(KeyboardInterrupt):
            model(x)
        monkeypatch.undo()
        assert_base(base, model)
        check(base, model, x)

    def test_when_the_adapted_layer_is_dropped(self, base: Net, x: Tensor) -> None:
        model = adapt(base)
        model(x)
        inner = model.base_model.model.first.base_layer
        del model
        gc.collect()
        assert torch.equal(inner.weight, base.first.weight)

    def test_moving_and_casting(self, base: Net, x: Tensor) -> None:
        model = adapt(base)
        model(x)
        model.to(torch.float32)
        assert torch.equal(layers(model)[0].base_layer.weight, base.first.weight.float())
        model.to(torch.float64)

    def test_the_base_may_be_replaced_in_training(self, base: Net, x: Tensor) -> None:
        """load_state_dict of new base weights: the columns kept aside are read anew."""
        model = adapt(base)
        check(base, model, x)
        other = Net().double()
        for name in ("first", "second"):
            layer = model.base_model.model.get_submodule(name).base_layer
            layer.load_state_dict(other.get_submodule(name).state_dict())
        check(other, model, x)
        assert_base(other, model)

    @pytest.mark.parametrize(
        "then", [lambda model, x: model(x), lambda model, x: model.state_dict()]
    )
    def test_changing_a_held_weight_while_columns_are_in_it_is_refused(
        self, then, base: Net, x: Tensor
    ) -> None:
        model = adapt(base)
        held = layers(model)[0].base_layer.weight
        model(x)
        with torch.no_grad():
            held.mul_(2)
        with pytest.raises(RuntimeError, match=r"changed in place .* through its module"):
            then(model, x)

    def test_swapping_a_held_weight_while_columns_are_in_it_is_refused(
        self, base: Net, x: Tensor
    ) -> None:
        model = adapt(base)
        held = layers(model)[0].base_layer.weight
        model(x)
        other = nn.Parameter(torch.randn_like(held), requires_grad=False)
        torch.utils.swap_tensors(held, other)
        with pytest.raises(RuntimeError, match=r"changed in place .* through its module"):
            model(x)

    def test_a_held_weight_that_is_unfrozen_while_columns_are_in_it_is_trained(
        self, base: Net, x: Tensor
    ) -> None:
        model = adapt(base)
        held = layers(model)[1].base_layer.weight
        model(x)
        held.requires_grad_()
        hidden = torch.tanh(layers(model)[0](x)).detach()
        layers(model)[1](hidden).sum().backward()
        assert held.grad is not None
        torch.testing.assert_close(held.grad, hidden.sum(0).expand_as(held))


def test_delta_parameters_copy_and_pickle_as_plain_ones(base: Net, x: Tensor) -> None:
    model = adapt(base)
    model(x).sum().backward()
    delta = deltas(model)[0]
    assert type(delta) is DeltaParameter
    for copied in (copy.deepcopy(delta), pickle.loads(pickle.dumps(delta))):
        assert torch.equal(copied, delta)
        assert getattr(copied, "residency", None) is None


def test_a_model_is_freed_without_the_garbage_collector(base: Net, x: Tensor) -> None:
    model = adapt(base)
    model(x).sum().backward()
    layer = model.base_model.model.first
    alive = [weakref.ref(layer.residency), weakref.ref(layer.base_layer)]
    gc.disable()
    try:
        model.base_model.model.first = nn.Identity()
        del layer
        assert all(reference() is None for reference in alive)
    finally:
        gc.enable()
