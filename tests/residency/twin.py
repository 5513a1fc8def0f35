"""One adapted layer of any kind, and all that is needed to say what it must do."""

import copy
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import get_peft_model
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from pacatune import PacaConfig
from pacatune.reference import adapted_kernel, adapted_weight

IN, OUT = 12, 8
TOLERANCES = {torch.float32: 2e-5, torch.bfloat16: 5e-2}


@dataclass(frozen=True)
class Kind:
    """How to build a layer, its adapted weight by the reference, and what N tokens are."""

    build: Callable[[], nn.Module]
    adapt: Callable[..., Tensor]
    inputs: Callable[[int], Tensor] = lambda num_tokens: torch.randn(num_tokens, IN)


KINDS = {
    "Linear": Kind(lambda: nn.Linear(IN, OUT), adapted_weight),
    "Conv1D": Kind(lambda: Conv1D(OUT, IN), lambda w, *update: adapted_weight(w.t(), *update).t()),
    "Conv2d": Kind(
        lambda: nn.Conv2d(IN, OUT, 3), adapted_kernel, lambda num: torch.randn(2, IN, num, 4)
    ),
    "Embedding": Kind(
        lambda: nn.Embedding(OUT, IN), adapted_weight, lambda num: torch.randint(OUT, (num,))
    ),
}


class Net(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


@dataclass
class Twin:
    """A PEFT model, and all that is needed to say what it must do."""

    model: Any
    plain: nn.Module
    kind: Kind
    saved: dict[int, Any]
    folder: Any
    rng: random.Random
    done: list[str] = field(default_factory=list)

    @property
    def layer(self) -> Any:
        return self.model.base_model.model.layer

    @property
    def adapters(self) -> list[str]:
        return list(self.layer.paca_delta)

    @property
    def active(self) -> list[str]:
        return list(self.layer.active_adapters)

    @property
    def merged(self) -> list[str]:
        return list(self.layer.merged_adapters)

    def update(self, name: str) -> tuple[Tensor, Tensor, float]:
        layer = self.layer
        return layer.delta_of(name), layer.paca_indices[name], layer.scaling[name]

    def inputs(self) -> Tensor:
        # With few tokens a float32 layer may leave the weight alone.
        x = self.kind.inputs(self.rng.choice([3, 70]))
        return x.to(self.plain.weight.dtype) if x.is_floating_point() else x

    def expected(self, x: Tensor, names: list[str]) -> tuple[Tensor, list[Tensor]]:
        """Output of the plain layer with these adapters in its weight, and the deltas it used."""
        weight, deltas = self.plain.weight.detach(), []
        for name in names:
            delta, indices, scaling = self.update(name)
            deltas.append(delta.detach().clone().requires_grad_())
            weight = self.kind.adapt(weight, deltas[-1], indices, scaling)
        return torch.func.functional_call(self.plain, {"weight": weight}, (x,)), deltas

    def check(self) -> None:
        """Compare the output, and, where something is trained, its gradient."""
        x, names = self.inputs(), self.merged or self.active
        y, deltas = self.expected(x, names)
        out = self.model(x)
        self.close(out, y)
        if self.merged:
            return
        gy = torch.randn_like(y)
        wanted = torch.autograd.grad(y, deltas, gy)
        found = torch.autograd.grad(out, [self.layer.delta_of(name) for name in names], gy)
        for ours, theirs in zip(found, wanted, strict=True):
            self.close(ours, theirs)

    def close(self, ours: Tensor, theirs: Tensor) -> None:
        tolerance = TOLERANCES[self.plain.weight.dtype] * max(
            1.0, float(theirs.detach().abs().max())
        )
        torch.testing.assert_close(ours, theirs, atol=tolerance, rtol=0)

    def check_base(self) -> None:
        assert torch.equal(self.layer.base_layer.weight, self.plain.weight)


def adapted(plain: nn.Module, rank: int = 3) -> Any:
    config = PacaConfig(r=rank, paca_alpha=4, target_modules=["layer"], init_weights=False)
    return get_peft_model(Net(copy.deepcopy(plain)), config)
