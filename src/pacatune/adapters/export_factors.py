"""The factors of the LoRA that says what a PaCA adapter says, and the names that PEFT gives them.

    linear       A (R, I) selects the columns, B (O, R) = delta
    embedding    A (R, V) = delta^T, B (D, R) selects the dimensions
    experts      A and B hold the factors of all E experts: A the selector E times, B the deltas
    attention    for the in_proj_weight of torch's; PEFT adds the update of its out_proj twice
    convolution  see `export_convolution`

A layer of lower rank than another is filled up with zeros.
"""

import torch
from torch import Tensor, nn

from pacatune.adapters.export_convolution import convolution_factors, refuse_inexpressible
from pacatune.adapters.folder import Adapter, is_parameter
from pacatune.adapters.target import find_target, target_shape
from pacatune.options import target_of
from pacatune.tuner.experts import is_transposed

__all__ = ["column_selector", "lora_factors", "rounded_factor"]


def column_selector(indices: Tensor, in_features: int, rank: int | None = None) -> Tensor:
    """Return the 0/1 matrix A with A x = x[indices].

    Args:
        indices: (R,) columns.
        in_features: I.
        rank: Number of rows, R if None; those beyond R are zeros.

    Returns:
        (rank, I) float32.
    """
    selector = torch.zeros(rank or len(indices), in_features)
    selector[torch.arange(len(indices)), indices] = 1
    return selector


def rounded_factor(factor: Tensor, dtype: torch.dtype, where: str) -> tuple[Tensor, float]:
    """Return a factor as it is written, and by what share of its size that was rounded.

    Args:
        factor: In float64.
        dtype: To write.
        where: Folder and module, for the message.

    Raises:
        ValueError: If a value is too big for `dtype`.
    """
    rounded = factor.to(dtype).contiguous()
    if not rounded.isfinite().all():
        raise ValueError(
            f"{where} holds {float(factor.abs().max()):.0e}, too big for {dtype}; export in "
            "float32 or bfloat16."
        )
    return rounded, float((rounded.double() - factor).norm() / factor.norm().clamp(min=1e-30))


def lora_factors(
    adapter: Adapter, base: nn.Module, name: str, update: Tensor, rank: int
) -> dict[str, Tensor]:
    """Return the factors of one layer by their names in PEFT's file, without its prefix.

    Args:
        adapter: The PaCA adapter.
        base: Its base, weights not needed.
        name: The layer's name in the base.
        update: Its (O, R, ...) update, in LoRA's scaling.
        rank: Of the LoRA adapter.

    Raises:
        ValueError: If PEFT's LoRA cannot say it.
    """
    found, shape = find_target(base, name), target_shape(base, name)
    assert found is not None, "check_base has seen it"
    assert shape is not None, "likewise"
    module, indices = found[0], adapter.modules[name].indices
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        refuse_inexpressible(module, f"{adapter.folder}: module {name!r}")
        factors = convolution_factors(update, indices, module.in_channels, module.groups)
        return _named(name, *factors)
    selector = column_selector(indices, shape[1], rank).to(update.dtype)
    filled = update.new_zeros(len(update), rank, *update.shape[2:])
    filled[:, : len(indices)] = update
    if is_parameter(adapter.config, name):
        return _experts_factors(adapter, module, name, selector, filled)
    if isinstance(module, nn.Embedding):
        return {f"{name}.lora_embedding_A": filled.t(), f"{name}.lora_embedding_B": selector.t()}
    if (target := target_of(name)) != name:
        return _attention_factors(target, selector, filled)
    _refuse_output_of_attention(base, name, f"{adapter.folder}: module {name!r}")
    return _named(name, selector, filled)


def _refuse_output_of_attention(base: nn.Module, name: str, where: str) -> None:
    owner, _, last = name.rpartition(".")
    if last == "out_proj" and isinstance(base.get_submodule(owner), nn.MultiheadAttention):
        raise ValueError(
            f"{where} is the out_proj of a torch.nn.MultiheadAttention, whose LoRA update PEFT "
            "(0.21) adds twice; merge the adapter instead (`pacatune merge`)."
        )


def _named(name: str, factor_a: Tensor, factor_b: Tensor) -> dict[str, Tensor]:
    return {f"{name}.lora_A.weight": factor_a, f"{name}.lora_B.weight": factor_b}


def _experts_factors(
    adapter: Adapter, experts: nn.Module, name: str, selector: Tensor, update: Tensor
) -> dict[str, Tensor]:
    """Return A (E * rank, I), expert by expert, and B (O, rank * E), rank by rank."""
    owner, _, parameter_name = name.rpartition(".")
    # PEFT wraps the module once for each parameter, in the order in which the module has them.
    adapted = [other for other in experts._parameters if f"{owner}.{other}" in adapter.modules]
    depth = len(adapted) - 1 - adapted.index(parameter_name)
    num_experts, where = update.shape[2], owner + ".base_layer" * depth
    if is_transposed(experts) and not hasattr(experts, "is_transposed"):
        # Llama 4, whose (E, I, O) PEFT takes for (E, O, I): its input is our output.
        factor_b = selector.t().unsqueeze(2).expand(-1, -1, num_experts)
        return _named(where, update.permute(2, 1, 0).flatten(0, 1), factor_b.flatten(1))
    return _named(where, selector.repeat(num_experts, 1), update.flatten(1))


def _attention_factors(target: str, selector: Tensor, update: Tensor) -> dict[str, Tensor]:
    """Return the factors of in_proj_weight, and zeros for the out_proj that PEFT adapts as well."""
    factors = _named(target, selector, update)
    zeros_a = torch.zeros_like(selector)
    zeros_b = update.new_zeros(selector.shape[1], len(selector))
    return factors | _named(f"{target}.base_layer.out_proj", zeros_a, zeros_b)
