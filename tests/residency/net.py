"""A small network through PEFT, and what plain autograd says of it."""

import copy
from collections.abc import Sequence

import torch
from peft import get_peft_model
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pacatune import PacaConfig
from tests.tuner.nets import Reference, deltas

ALPHA = 6.0


class Net(nn.Module):
    """Two linear layers; `checkpointing` is None, "reentrant" or "non-reentrant"."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(10, 12)
        self.second = nn.Linear(12, 6, bias=False)
        self.checkpointing: str | None = None

    def body(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))

    def forward(self, x: Tensor) -> Tensor:
        if self.checkpointing is None:
            return self.body(x)
        return checkpoint(self.body, x, use_reentrant=self.checkpointing == "reentrant")


def adapt(base: Net, **options) -> nn.Module:
    config = PacaConfig(r=3, paca_alpha=ALPHA, target_modules=["first", "second"], **options)
    model = get_peft_model(copy.deepcopy(base), config, autocast_adapter_dtype=False)
    with torch.no_grad():
        for delta in deltas(model):
            delta.normal_(generator=torch.Generator().manual_seed(delta.numel()))
    return model


def layers(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if hasattr(module, "paca_delta")]


def expected(base: Net, model: nn.Module, x: Tensor, adapter: str = "default"):
    """Output and gradients (x, deltas) of sum(y ** 2) by plain autograd at the current deltas."""
    reference, x = Reference(base, model, adapter), x.clone().requires_grad_()
    y = reference(x)
    return y.detach(), torch.autograd.grad(y.square().sum(), [x, *reference.deltas])


def check(base: Net, model: nn.Module, x: Tensor, adapter: str = "default") -> None:
    """Forward and every gradient equal plain autograd; earlier gradients are cleared."""
    y, wanted = expected(base, model, x, adapter)
    model.zero_grad()
    x = x.clone().requires_grad_()
    out = model(x)
    out.square().sum().backward()
    assert_close(out, y)
    assert_gradients(model, wanted, x, adapter)


def assert_gradients(
    model: nn.Module, wanted: Sequence[Tensor], x: Tensor, adapter: str = "default"
) -> None:
    """Hold gradients against those of `expected`: of the input, if it asks for one, and deltas."""
    found = [x.grad, *(delta.grad for delta in deltas(model, adapter))]
    for ours, theirs in list(zip(found, wanted, strict=True))[not x.requires_grad :]:
        assert_close(ours, theirs)


def assert_close(ours: Tensor, theirs: Tensor) -> None:
    tolerance = 1e-10 * max(1.0, float(theirs.detach().abs().max()))
    torch.testing.assert_close(ours, theirs, atol=tolerance, rtol=0)


def evaluate(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return model(x)


def check_evaluation(base: Net, model: nn.Module, x: Tensor) -> None:
    assert_close(evaluate(model, x), expected(base, model, x)[0])


def move(model: nn.Module) -> None:
    with torch.no_grad():
        for delta in deltas(model):
            delta.add_(0.1)


def add_other(model: nn.Module) -> None:
    """Add an adapter that changes nothing yet."""
    model.add_adapter("other", PacaConfig(r=4, target_modules=["first", "second"], random_seed=7))


def assert_base(base: Net, model: nn.Module) -> None:
    for layer, plain in zip(layers(model), (base.first, base.second), strict=True):
        assert torch.equal(layer.base_layer.weight, plain.weight)
