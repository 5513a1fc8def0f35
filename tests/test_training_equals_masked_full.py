"""PaCA trains exactly what full fine-tuning trains when all other gradients are masked (Eq. 11)."""

import copy

import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn

from pacatune import PacaConfig
from tests.conftest import build_model

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
