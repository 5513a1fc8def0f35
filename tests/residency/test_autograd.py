"""R3: our writes never trip autograd, and looking changes no gradient."""

import pytest
import torch
from torch import Tensor

from pacatune import PacaConfig
from tests.residency.looks import LOOKS, assert_sees_base
from tests.residency.net import Net, adapt, assert_base, deltas, expected
from tests.residency.twin import KINDS, twin_of


class TestR3Autograd:
    """Our writes never trip autograd, and looking changes no gradient."""

    def test_two_forwards_before_one_backward(self, base: Net, x: Tensor) -> None:
        model = adapt(base)
        want = [expected(base, model, x)[1], expected(base, model, 2 * x)[1]]
        (model(x).square().sum() + model(2 * x).square().sum()).backward()
        for delta, one, two in zip(deltas(model), want[0][1:], want[1][1:], strict=True):
            torch.testing.assert_close(delta.grad, one + two)

    def test_retain_graph(self, base: Net, x: Tensor) -> None:
        model = adapt(base)
        want = expected(base, model, x)[1]
        loss = model(x).square().sum()
        loss.backward(retain_graph=True)
        loss.backward()
        for delta, grad in zip(deltas(model), want[1:], strict=True):
            torch.testing.assert_close(delta.grad, 2 * grad)

    def test_reference_pass_between_forward_and_backward(self, base: Net, x: Tensor) -> None:
        """As DPO does with one model for policy and reference."""
        model = adapt(base)
        want = expected(base, model, x)[1]
        loss = model(x).square().sum()
        with torch.no_grad(), model.disable_adapter():
            assert torch.equal(model(x), base(x))
        loss.backward()
        for delta, grad in zip(deltas(model), want[1:], strict=True):
            torch.testing.assert_close(delta.grad, grad)

    @pytest.mark.parametrize("keep", [False, True], ids=["dropped", "held"])
    @pytest.mark.parametrize("look", LOOKS.values(), ids=LOOKS)
    @pytest.mark.parametrize("checkpointing", [None, "reentrant", "non-reentrant"])
    def test_looks_between_forward_and_backward(
        self, look, keep: bool, checkpointing: str | None, base: Net, x: Tensor
    ) -> None:
        model = adapt(base)
        model.base_model.model.checkpointing = checkpointing
        want = expected(base, model, x)[1]
        batch = x.clone().requires_grad_()
        loss = model(batch).square().sum()
        seen = look(model)
        assert_sees_base(base, seen)
        if not keep:
            del seen
        loss.backward()
        for ours, theirs in zip([batch.grad, *(d.grad for d in deltas(model))], want, strict=True):
            torch.testing.assert_close(ours, theirs)
        if keep and look is not LOOKS["attribute"] and look is not LOOKS["parameters"]:
            assert_sees_base(base, seen)

    def test_switch_and_back_between_forward_and_backward(self, base: Net, x: Tensor) -> None:
        model = adapt(base)
        model.add_adapter("other", PacaConfig(r=4, target_modules=["first", "second"]))
        model.set_adapter("default")
        want = expected(base, model, x)[1]
        loss = model(x).square().sum()
        model.set_adapter("other")
        model(x)
        model.set_adapter("default")
        loss.backward()
        for delta, grad in zip(deltas(model), want[1:], strict=True):
            torch.testing.assert_close(delta.grad, grad)

    @pytest.mark.parametrize("kind", KINDS)
    def test_a_fused_step_between_forward_and_backward(self, kind: str) -> None:
        """The gradients are those of the forward pass, or refused; it counts no version."""
        twin = twin_of(kind)
        (delta,) = (twin.layer.delta_of(name) for name in twin.active)
        delta.grad = torch.ones_like(delta)
        x = twin.inputs()
        sources = [x.requires_grad_(), delta] if x.is_floating_point() else [delta]
        y, values = twin.expected(x, twin.active)
        want = torch.autograd.grad(y.sum(), [*sources[:-1], *values])
        loss = twin.model(x).sum()
        torch.optim.AdamW([delta], lr=1.0, fused=True).step()
        try:
            found = torch.autograd.grad(loss, sources)
        except RuntimeError as error:
            assert "modified by an inplace operation" in str(error)  # noqa: PT017
            return
        for ours, theirs in zip(found, want, strict=True):
            twin.close(ours, theirs)

    def test_backward_after_merging_is_refused(self, base: Net, x: Tensor) -> None:
        model = adapt(base)
        loss = model(x.clone().requires_grad_()).square().sum()
        model.merge_adapter()
        with pytest.raises(RuntimeError, match=r"before the adapter was merged.*unmerge_adapter"):
            loss.backward()
        model.unmerge_adapter()
        assert_base(base, model)
