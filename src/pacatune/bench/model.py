"""The measured model: random weights, made on the device, quantised layer by layer."""

from typing import Any, cast

import torch
from torch import Tensor, nn

__all__ = ["make_batch", "make_model", "make_skeleton"]


def make_model(
    values: dict[str, Any],
    dtype: torch.dtype,
    device: torch.device,
    *,
    seed: int,
    quantization: str | None = None,
    max_length: int = 0,
) -> nn.Module:
    """Return a causal language model whose embeddings ask for a gradient, in every method alike.

    Input gradients then flow through every layer: what a method does is exactly what the frozen
    model does and something more.

    Args:
        values: Of its configuration, `model_type` among them.
        dtype: Of its weights.
        device: Where they are made.
        seed: Of its weights.
        quantization: nf4 or fp4, doubly quantised by bitsandbytes; None leaves them as they are.
            No more than one layer is ever there unquantised.
        max_length: Length of the longest row.
    """
    model = make_skeleton(values, dtype, max_length)
    if quantization is not None:
        _replace_linear(model, dtype, quantization)
    torch.manual_seed(seed)
    for module in model.modules():
        _fill(model, module, dtype, device)
    model.tie_weights()
    model.enable_input_require_grads()
    return cast(nn.Module, model)


def make_skeleton(values: dict[str, Any], dtype: torch.dtype, max_length: int = 0) -> Any:
    """Return the model without weights.

    Args:
        values: Of its configuration.
        dtype: Of its weights.
        max_length: Length of the longest row.

    Raises:
        ValueError: If it is no causal language model.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    values = {name: value for name, value in values.items() if name != "use_cache"}
    config = AutoConfig.for_model(**values, use_cache=False)
    if getattr(config, "max_position_embeddings", max_length) < max_length:
        config.max_position_embeddings = max_length
    with torch.device("meta"):
        try:
            return AutoModelForCausalLM.from_config(
                config, dtype=dtype, attn_implementation="sdpa", trust_remote_code=False
            )
        except ValueError as error:
            if "Unrecognized configuration class" not in str(error):
                raise
            raise ValueError(
                f"{config.model_type!r} is no causal language model; choose one that is."
            ) from error


def _replace_linear(model: Any, dtype: torch.dtype, quantization: str) -> None:
    from transformers import BitsAndBytesConfig
    from transformers.integrations import replace_with_bnb_linear

    from pacatune.tuner.quantized import forbid_packing

    head = model.get_output_embeddings()
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quantization,
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
    left = [name for name, module in model.named_modules() if module is head]
    replace_with_bnb_linear(model, modules_to_not_convert=left, quantization_config=config)
    forbid_packing(model)
    model.is_loaded_in_4bit = model.is_quantized = True


def _fill(model: Any, module: nn.Module, dtype: torch.dtype, device: torch.device) -> None:
    """Give one module's own tensors their place and random or neutral values."""
    if type(module).__name__ == "Linear4bit":
        _fill_quantized(model, cast(Any, module), dtype, device)
        return
    if not any(tensor.is_meta for tensor in _own_tensors(module)):
        return
    module.to_empty(device=device, recurse=False)
    with torch.no_grad():
        for tensor in _own_tensors(module):
            tensor.zero_()  # in case the model's own rule forgets one
        model._init_weights(module)


def _fill_quantized(model: Any, layer: Any, dtype: torch.dtype, device: torch.device) -> None:
    from bitsandbytes.nn.modules import Params4bit

    std = getattr(model.config, "initializer_range", 0.02)
    weight = torch.empty(layer.out_features, layer.in_features, dtype=dtype, device=device)
    old = layer.weight
    make: Any = Params4bit
    layer.weight = make(
        weight.normal_(std=std),
        requires_grad=False,
        quant_type=old.quant_type,
        compress_statistics=old.compress_statistics,
        module=layer,
    ).to(device)
    layer.quant_state = layer.weight.quant_state
    if layer.bias is not None:
        layer.bias = nn.Parameter(torch.zeros(layer.out_features, dtype=dtype, device=device))


def _own_tensors(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(recurse=False), *module.buffers(recurse=False)]


def make_batch(num_rows: int, num_tokens: int, vocab_size: int, seed: int) -> Tensor:
    """Return (B, T) random tokens.

    Args:
        num_rows: B.
        num_tokens: T.
        vocab_size: Tokens are below it.
        seed: Of the tokens.
    """
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(vocab_size, (num_rows, num_tokens), generator=generator)
