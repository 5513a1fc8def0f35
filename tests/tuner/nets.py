"""Adapters that do something on any small model, what plain autograd says of it, and a CNN."""

import copy
from typing import Any

import torch
from peft import get_peft_model
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from pacatune import PacaConfig
from tests.ops.reference import adapted_experts, adapted_kernel, adapted_weight


def adapt(base: nn.Module, *, random: bool = True, **options) -> nn.Module:
    config = PacaConfig(**{"r": 3, "paca_alpha": 6, **options})
    model = get_peft_model(copy.deepcopy(base), config, autocast_adapter_dtype=False)
    if random:
        fill(model)
    return model


def layers(model: nn.Module) -> dict[str, Any]:
    """Return the adapted layers by the name of what they adapt in the base model."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    return {name: m for name, m in inner.named_modules() if hasattr(m, "paca_delta")}


def deltas(model: nn.Module, adapter: str = "default") -> list[nn.Parameter]:
    """Return what an adapter trains of its layers."""
    own = [layer for layer in layers(model).values() if adapter in layer.r]
    return [trained for layer in own for trained in layer.update_of(adapter).trained()]


def fill(model: nn.Module, adapter: str = "default", seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for delta in deltas(model, adapter):
            delta.normal_(std=0.2, generator=generator)


def evaluate(model: nn.Module, *args, **kwargs) -> Any:
    with torch.no_grad():
        return model.eval()(*args, **kwargs)


class Reference(nn.Module):
    """The base model whose own forward runs with the adapted weights, made anew in each call."""

    def __init__(self, base: nn.Module, model: nn.Module, *adapters: str) -> None:
        super().__init__()
        self.base = copy.deepcopy(base).requires_grad_(False)
        self.adapters = adapters or ("default",)
        self.updates = []
        self.deltas = nn.ParameterList()
        for adapter in self.adapters:
            for name, layer in layers(model).items():
                if adapter in layer.r:
                    update = layer.update_of(adapter)
                    self.deltas.extend(one.detach().clone() for one in update.trained())
                    self.updates.append((name, update))

    def forward(self, *args, **kwargs):
        parameters = dict(self.base.named_parameters())
        factors = iter(self.deltas)
        for name, update in self.updates:
            name = name if name in parameters else f"{name}.weight"
            module, delta = self.base.get_submodule(name.rpartition(".")[0]), next(factors)
            if update.mix is not None:
                delta = product(delta, next(factors))
            where = update.indices, update.scaling
            parameters[name] = adapted(module, parameters[name], delta, *where)
        return torch.func.functional_call(self.base, parameters, args, kwargs)


def product(delta: Tensor, mix: Tensor | None = None) -> Tensor:
    """Return the update of all columns, in float32 at least."""
    if mix is None:
        return delta
    equation = "eor,erc->eoc" if delta.dim() == 3 else "or,rc...->oc..."
    wide = [factor.float() if factor.itemsize < 4 else factor for factor in (delta, mix)]
    return torch.einsum(equation, *wide)


def adapted(module: nn.Module, weight: Tensor, *update: Any) -> Tensor:
    """Return the weight of a module with an update: delta, its columns, scaling."""
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return adapted_kernel(weight, *update, module.groups)
    if weight.dim() == 3:
        is_transposed = type(module).__name__.startswith(("GptOss", "Llama4"))
        return adapted_experts(weight, *update, is_transposed=is_transposed)
    if isinstance(module, Conv1D):
        return adapted_weight(weight.t(), *update).t()
    return adapted_weight(weight, *update)


def assert_equal(
    model: nn.Module, reference: Reference, *args, tolerance=1e-10, seed=None, **kwargs
) -> None:
    """Hold outputs and the gradients of inputs and deltas against those of the reference."""
    results = []
    ours = [delta for adapter in reference.adapters for delta in deltas(model, adapter)]
    for which, trained in ((model, ours), (reference, list(reference.deltas))):
        if seed is not None:
            torch.manual_seed(seed)
        y = which(*args, **kwargs)
        outputs = [getattr(y, "logits", y)] if not isinstance(y, tuple) else y
        outputs = [one for one in outputs if one is not None]
        sources = [*(x for x in args if x.requires_grad), *trained]
        for source in sources:
            source.grad = None
        sum(one.square().mean() for one in outputs).backward()
        results.append([*outputs, *(source.grad for source in sources)])
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, atol=tolerance, rtol=tolerance)


class Cnn(nn.Module):
    """A small image classifier with depthwise blocks."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.blocks = nn.ModuleList(
            nn.ModuleDict(
                {
                    "expand": nn.Conv2d(8, 16, 1),
                    "depthwise": nn.Conv2d(16, 16, 3, padding=1, groups=16),
                    "project": nn.Conv2d(16, 8, 1),
                }
            )
            for _ in range(2)
        )
        self.grouped = nn.Conv2d(8, 12, 3, groups=4, padding=1)
        self.head = nn.Linear(12, 5)

    def forward(self, x):
        x = F.silu(self.norm(self.stem(x)))
        for block in self.blocks:
            y = F.silu(block["expand"](x))
            x = x + block["project"](F.silu(block["depthwise"](y)))
        return self.head(self.grouped(x).mean((2, 3)))


CNN_TARGETS = ["stem", "expand", "depthwise", "project", "grouped", "head"]
