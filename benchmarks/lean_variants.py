"""What is done to a model so that it keeps less: levels of `pacatune.lean`, and their rivals.

`inputs` is the cheapest rival: the input of a layer is not kept where a norm or a gated product
made it, which cost next to nothing to compute again; no projection is computed twice. NeMo
Automodel's fused LoRA MLP is of this kind (it keeps x, gate and up; here x comes from the norm's
input as well). It is built of the parts that the levels are made of.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from pacatune import lean
from pacatune.lean.gated import apply_gated_product
from pacatune.lean.modules import LeanAttention, LeanGatedMLP
from pacatune.lean.recompute import Cut, recompute, state_of
from pacatune.measure.models import checkpoint_blocks

__all__ = ["VARIANTS", "apply_variant"]

_ATTENTION = (
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
)


def apply_variant(model: Any, variant: str) -> None:
    """Let a model, with its adapter, keep what one of `VARIANTS` keeps; in place."""
    VARIANTS[variant][1](model)


def _level(level: int, model: Any, blocks: str = "") -> None:
    if level:
        lean.enable(model, mode="require", level=level)
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    if blocks == "checkpointed":
        checkpoint_blocks(base)
    elif blocks == "selective":
        policy = partial(_keep, base.config.intermediate_size)
        context = partial(create_selective_checkpoint_contexts, policy)
        options = {"use_reentrant": False, "context_fn": context}
        enable = getattr(base, "activation_checkpointing_enable", None)
        (enable or base.gradient_checkpointing_enable)(options)


def _keep(width: int, context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """Keep attention, and products that the MLP has no part in: what level 2 keeps, and o_proj."""
    is_product = op in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
    is_narrow = is_product and not any(width in x.shape for x in args if isinstance(x, Tensor))
    if op in _ATTENTION or is_narrow:
        return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE


def _recompute_inputs(model: nn.Module) -> None:
    lean.enable(model, mode="require")
    for module in model.modules():
        if isinstance(module, LeanGatedMLP):
            module.forward = partial(_mlp, module)
        elif isinstance(module, LeanAttention):
            module.forward = partial(_attention, module, module.forward)


def _mlp(module: Any, x: Tensor) -> Tensor:
    names, parts = module.settings, module._modules
    activation, down = names.activation, parts[names.down]

    def project(x: Tensor, cut: Cut) -> Tensor:
        (x,) = cut(x)
        with cut.casts():
            gate, up = parts[names.gate](x), parts[names.up](x)
        return recompute(multiply, [gate, up], down, state_of(down))

    def multiply(gate: Tensor, up: Tensor, cut: Cut) -> Tensor:
        (h,) = cut(apply_gated_product(gate, up, activation))
        with cut.casts():
            y: Tensor = down(h)
        return y

    return recompute(project, [x], module, state_of(module))


def _attention(module: nn.Module, run: Callable[..., Any], **kwargs: Any) -> Any:
    x = kwargs.pop("hidden_states")

    def body(x: Tensor, cut: Cut) -> Tensor:
        (x,) = cut(x)
        with cut.casts():
            y: Tensor = run(x, **kwargs)[0]
        return y

    return recompute(body, [x], module, state_of(module)), None


VARIANTS: dict[str, tuple[str, Callable[[Any], None]]] = {
    "plain": ("as transformers and PEFT compute", partial(_level, 0)),
    "level 1": (
        "pacatune.lean: what elementwise operations make is made again",
        partial(_level, 1),
    ),
    "inputs": (
        "level 1, and inputs of layers from the norm's input, or from gate and up",
        _recompute_inputs,
    ),
    "level 2": ("gate and up from the norm's input", partial(_level, 2)),
    "level 3": ("query, key and value, too", partial(_level, 3)),
    "selective": (
        "level 1, and torch's selective checkpointing of blocks, keeping what level 2 keeps",
        partial(_level, 1, blocks="selective"),
    ),
    "checkpointed": (
        "level 1, and torch's checkpointing of blocks",
        partial(_level, 1, blocks="checkpointed"),
    ),
    "checkpointed, level 2": (
        "level 2, and torch's checkpointing of blocks",
        partial(_level, 2, blocks="checkpointed"),
    ),
}
"""Name -> description, and what makes a model so."""
