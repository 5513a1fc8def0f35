"""PaCA trains exactly what full fine-tuning trains when all other gradients are masked (Eq. 11)."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import get_peft_model
from torch import Tensor, nn

from pacatune import PacaConfig
from pacatune.ops import paca_linear
from tests.conftest import build_model
from tests.ops import reference

STEPS = 20


def optimizer_for(name: str, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    if name == "sgd":
        return torch.optim.SGD(parameters, lr=0.5, momentum=0.9)
    return torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.0, fused=name == "adamw fused")


# The name that transformers 5.17 to 5.24 share.
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
# Each value of one beside each value of every other.
@pytest.mark.parametrize(
    ("optimizer_name", "checkpointing", "accumulation", "dtype"),
    [
        ("sgd", None, 1, torch.float64),
        ("sgd", False, 3, torch.float64),
        ("sgd", True, 1, torch.float32),
        ("adamw", None, 3, torch.float32),
        ("adamw", False, 1, torch.float64),
        ("adamw", True, 3, torch.float64),
        ("adamw fused", None, 1, torch.float64),
        ("adamw fused", False, 3, torch.float32),
        ("adamw fused", True, 1, torch.float64),
    ],
)
def test_twenty_steps(
    optimizer_name: str,
    checkpointing: bool | None,
    accumulation: int,
    dtype: torch.dtype,
) -> None:
    tolerance = 1e-10 if dtype == torch.float64 else 2e-4
    full = build_model(50).to(dtype)
    config = PacaConfig(r=4, paca_alpha=4, target_modules="all-linear")
    model = get_peft_model(copy.deepcopy(full), config, autocast_adapter_dtype=False)
    adapted = {
        name: module
        for name, module in model.base_model.model.named_modules()
        if hasattr(module, "paca_indices")
    }
    full.requires_grad_(False)
    for name, layer in adapted.items():
        weight = full.get_submodule(name).weight.requires_grad_()
        mask = torch.zeros_like(weight)
        mask[:, layer.paca_indices["default"]] = 1
        weight.register_hook(lambda grad, mask=mask: grad * mask)
    models = [full.train(), model.train()]
    for one in models:
        one.config.use_cache = False
        if checkpointing is not None:
            one.gradient_checkpointing_enable({"use_reentrant": checkpointing})
            one.enable_input_require_grads()
    optimizers = [
        optimizer_for(optimizer_name, [p for p in one.parameters() if p.requires_grad])
        for one in models
    ]
    generator = torch.Generator().manual_seed(1)
    for _ in range(STEPS):
        batches = torch.randint(0, 50, (accumulation, 2, 12), generator=generator)
        losses: list[list[Tensor]] = [[], []]
        for number, (one, optimizer) in enumerate(zip(models, optimizers, strict=True)):
            for batch in batches:
                loss = one(input_ids=batch, labels=batch).loss / accumulation
                loss.backward()
                losses[number].append(loss.detach())
            optimizer.step()
            optimizer.zero_grad()
        torch.testing.assert_close(losses[1], losses[0], atol=tolerance, rtol=tolerance)
    merged = model.merge_and_unload()
    for name in adapted:
        ours, theirs = merged.get_submodule(name).weight, full.get_submodule(name).weight
        torch.testing.assert_close(ours, theirs, atol=10 * tolerance, rtol=10 * tolerance)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    rank=st.integers(1, 6),
    fraction=st.floats(0.05, 0.98),
    loss_name=st.sampled_from(["least squares", "logistic"]),
)
def test_theorem_1(seed: int, rank: int, fraction: float, loss_name: str) -> None:
    """f(k+1) <= f(k) - eta (1 - eta L / 2) ||grad P||^2 at every step, for 0 < eta < 2 / L."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(16, 6, generator=generator, dtype=torch.float64)
    weight = torch.randn(3, 6, generator=generator, dtype=torch.float64)
    target = torch.randn(16, 3, generator=generator, dtype=torch.float64)
    indices = torch.randperm(6, generator=generator)[:rank].sort().values
    delta = torch.zeros(3, rank, dtype=torch.float64, requires_grad=True)
    largest = float(torch.linalg.matrix_norm(x, 2)) ** 2 / len(x)
    # Lipschitz constants of the gradients: that of the loss in its input times that of the map.
    lipschitz = largest if loss_name == "least squares" else largest / 4

    def loss_of(weight: Tensor) -> Tensor:
        y = paca_linear(x, weight, delta, indices, 1.0)
        if loss_name == "least squares":
            return (y - target).square().sum() / (2 * len(x))
        return nn.functional.softplus(-y * target.sign()).sum() / len(x)

    eta = fraction * 2 / lipschitz
    for _ in range(10):
        current = reference.adapted_weight(weight, delta.detach(), indices, 1.0)
        before = loss_of(current)
        (gradient,) = torch.autograd.grad(before, delta)
        with torch.no_grad():
            delta -= eta * gradient
            after = loss_of(reference.adapted_weight(weight, delta, indices, 1.0))
        bound = before - eta * (1 - eta * lipschitz / 2) * gradient.square().sum()
        assert after <= bound + 1e-12
