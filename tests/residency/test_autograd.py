"""R3: our writes never trip autograd; a backward pass is that of its forward, or refused."""

import pickle

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import allow_mutation_on_saved_tensors, saved_tensors_hooks

from tests.residency import net
from tests.residency.looks import COPIED, LOOKS, assert_sees_base
from tests.residency.twin import KINDS, MIXED, twin_of


@pytest.mark.parametrize(
    ("look", "checkpointing"),
    [*((look, None) for look in LOOKS), *(("state_dict", f"{n}reentrant") for n in ("", "non-"))],
)
@pytest.mark.parametrize("keep", [False, True], ids=["dropped", "held"])
def test_looks_between_forward_and_backward(look, checkpointing, keep, base, model, x):
    model.base_model.model.checkpointing = checkpointing
    wanted = net.expected(base, model, x)[1]
    loss = model(x.requires_grad_()).square().sum()
    seen = LOOKS[look](model)
    assert_sees_base(base, seen)
    if not keep:
        del seen
    loss.backward()
    net.assert_gradients(model, wanted, x)
    if keep and look in (*COPIED, "state_dict"):
        assert_sees_base(base, seen)


def reference(model: nn.Module, x: Tensor) -> None:
    """As DPO does with one model for policy and reference."""
    with model.disable_adapter():
        net.evaluate(model, x)


def switch_and_back(model: nn.Module, x: Tensor) -> None:
    net.add_other(model)
    model.set_adapter("other")
    model(x)
    model.set_adapter("default")


def call_functionally(model: nn.Module, x: Tensor) -> None:
    """With other tensors in the weights' place meanwhile."""
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    torch.func.functional_call(model, parameters, (x,))


def merge_and_unmerge(model: nn.Module, x: Tensor) -> None:
    model.merge_adapter()
    model.unmerge_adapter()


def call_while_merged(model: nn.Module, x: Tensor) -> None:
    model.merge_adapter()
    call_functionally(model, x)
    model.unmerge_adapter()
    call_functionally(model, x)


def merge_something_broken(model: nn.Module, x: Tensor) -> None:
    kept = net.deltas(model)[1].detach().clone()
    net.deltas(model)[1].data.fill_(torch.nan)
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match="NaNs detected"):
            merge(safe_merge=True)
        assert [layer.merged_adapters for layer in net.layers(model)] == [[], []]
    net.deltas(model)[1].data.copy_(kept)


@pytest.mark.parametrize(
    "act",
    [reference, switch_and_back, merge_and_unmerge, call_while_merged, merge_something_broken],
    ids=lambda act: act.__name__,
)
def test_gradients_are_those_of_the_forward_pass(act, base, model, x):
    merge_and_unmerge(model, x)  # what has been before does not matter
    wanted = net.expected(base, model, x)[1]
    loss = model(x).square().sum()
    act(model, x)
    loss.backward()
    net.assert_gradients(model, wanted, x)
    net.assert_base(base, model)


def test_a_backward_after_unloading(base, model, x):
    """When the plain model has been handed back; its weights are torch's own."""
    wanted, trained = net.expected(base, model, x)[1], net.deltas(model)
    loss = model(x).square().sum()
    plain = model.unload()
    loss.backward()
    for delta, grad in zip(trained, wanted[1:], strict=True):
        torch.testing.assert_close(delta.grad, grad)
    assert type(plain.first._parameters) is dict
    for ours, theirs in zip(plain.parameters(), base.parameters(), strict=True):
        assert type(ours) is nn.Parameter
        assert torch.equal(ours, theirs)


def change_base(model: nn.Module, x: Tensor) -> None:
    with torch.no_grad():
        net.layers(model)[1].base_layer.weight.mul_(2)


def change_base_while_merged(model: nn.Module, x: Tensor) -> None:
    model.merge_adapter()
    change_base(model, x)
    model.unmerge_adapter()


def merge(model: nn.Module, x: Tensor) -> None:
    model.merge_adapter()


@pytest.mark.parametrize(
    ("before", "act", "words"),
    [
        (None, merge, r"before the adapter was merged.*unmerge_adapter"),
        (None, change_base, r"whose base weight was changed.*forward pass again"),
        (None, change_base_while_merged, "whose base weight was changed"),
        (merge, lambda model, x: model.unmerge_adapter(), "modified by an inplace operation"),
    ],
)
def test_backward_of_another_function_is_refused(before, act, words, model, x):
    if before is not None:
        before(model, x)
    loss = model(x.requires_grad_()).square().sum()
    act(model, x)
    with pytest.raises(RuntimeError, match=words):
        loss.backward()


@pytest.mark.parametrize("pickled", [False, True])
@pytest.mark.parametrize("kind", [*KINDS, *MIXED])
def test_a_fused_step_between_forward_and_backward(kind, pickled):
    """The gradients are those of the forward pass, or refused; it counts no version."""
    twin = twin_of(kind, torch.float32 if "quantised" in kind else torch.float64)
    if pickled:
        twin.model = pickle.loads(pickle.dumps(twin.model))
    trained = twin.trained()
    for parameter in trained:
        parameter.grad = torch.ones_like(parameter)
    x = twin.inputs()
    sources = [x.requires_grad_(), *trained] if x.is_floating_point() else trained
    y, values = twin.expected(x, twin.active)
    wanted = torch.autograd.grad(y.sum(), [*sources[: -len(values)], *values])
    loss = twin.model(x).sum()
    torch.optim.AdamW(trained, lr=1.0, fused=True).step()
    try:
        found = torch.autograd.grad(loss, sources)
    except RuntimeError as error:
        assert "modified by an inplace operation" in str(error)  # noqa: PT017
        return
    for ours, theirs in zip(found, wanted, strict=True):
        twin.close(ours, theirs)


def copies() -> saved_tensors_hooks:
    """As activation offloading does; a copy of the weight would be of another state."""
    return saved_tensors_hooks(torch.clone, lambda kept: kept)


@pytest.mark.parametrize("between", [nn.Module.state_dict, net.move])
@pytest.mark.parametrize("hooks", [copies, allow_mutation_on_saved_tensors])
def test_hooks_that_keep_what_is_saved(hooks, between, base, model, x):
    """Of a delta that was changed since, they keep the old values."""
    wanted = net.expected(base, model, x)[1]
    with hooks():
        loss = model(x.requires_grad_()).square().sum()
        between(model)
        model(x)  # the new columns are in the weight
        loss.backward()
    net.assert_gradients(model, wanted, x)


def test_no_weight_is_saved(model, x):
    saved: list[Tensor] = []
    with saved_tensors_hooks(saved.append, lambda t: t):
        model(x.requires_grad_())
    weights = {layer.residency.weight.data_ptr() for layer in net.layers(model)}
    assert not weights & {t.data_ptr() for t in saved if isinstance(t, Tensor)}


def test_torch_func_leaves_residency_as_it_was(model, x):
    call_functionally(model, x)
    model(x)
    assert all(layer.residency.is_written for layer in net.layers(model))
