"""The model that is measured or simulated: its configuration, its modules, random weights.

Everything is found out from the configuration; no code that comes with a model is ever executed.
"""

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from pacatune import pretrained
from pacatune.measure.presets import PRESETS
from pacatune.measure.setting import check_sizes
from pacatune.names import guess
from pacatune.pretrained import bitsandbytes_config, check_quantizable, empty_model

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

# Llama's proportions: the MLP is 8/3 as wide as the model, rounded up; 2-7B has 7.8 tokens per
# channel.
_ROUND_MLP_TO = 128
_TOKENS_PER_CHANNEL, _MAX_VOCAB = 8, 32000
_WIDE = 2048


def parse_shape(text: str) -> tuple[int, int]:
    """Return hidden size and number of layers of a text such as `512x8`."""
    match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text)
    if match is None:
        raise ValueError(
            f"`shape` ({text!r}) must be HIDDENxLAYERS, two whole numbers of at least 1, such as "
            "512x8."
        )
    return int(match[1]), int(match[2])


def llama_values(
    hidden_size: int,
    num_layers: int,
    *,
    num_heads: int | None = None,
    num_kv_heads: int | None = None,
    intermediate_size: int | None = None,
    vocab_size: int | None = None,
) -> dict[str, Any]:
    """Return the configuration values of a Llama, in Llama's proportions unless given.

    Heads have 128 channels from `hidden_size` 2048 on, else 64 or fewer.
    """
    check_sizes(locals())
    dims = (128, 64, 32, 16, 8)[hidden_size < _WIDE :]
    fitting = (hidden_size // dim for dim in dims if hidden_size % dim == 0)
    heads = num_heads or next(fitting, 1)
    kv_heads = num_kv_heads or heads
    if hidden_size % heads or hidden_size // heads % 2 or heads % kv_heads:
        raise ValueError(
            f"`num_heads` ({heads}) must divide `hidden_size` ({hidden_size}) into an even number "
            f"of channels per head, and `num_kv_heads` ({kv_heads}) must divide `num_heads`; "
            "choose other numbers of heads."
        )
    mlp = -(-(8 * hidden_size) // (3 * _ROUND_MLP_TO)) * _ROUND_MLP_TO
    return {
        "model_type": "llama",
        "hidden_size": hidden_size,
        "intermediate_size": intermediate_size or mlp,
        "num_hidden_layers": num_layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocab_size or min(_TOKENS_PER_CHANNEL * hidden_size, _MAX_VOCAB),
        "tie_word_embeddings": False,
    }


def load_config(model: str) -> "PreTrainedConfig":
    """Return the configuration of a model.

    `model` is a name of `PRESETS`, a config.json, a folder that holds one, or a hub id, of which
    nothing but config.json is downloaded.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    if model in PRESETS:
        return cast("PreTrainedConfig", AutoConfig.for_model(**PRESETS[model].values))
    file = Path(model).expanduser()
    if not file.exists() and "/" not in model:
        hint = guess(model.lower(), PRESETS, cutoff=0.4) or "none is like it. "
        raise ValueError(
            f"unknown model {model!r}; {hint}Known are {', '.join(PRESETS)}, and any config.json, "
            "model folder or hub id."
        )
    try:
        if file.is_file():
            with pretrained.no_remote_code(model):
                config = AutoConfig.from_pretrained(file, trust_remote_code=False)
        else:
            config = pretrained.load_config(model, option="model")
    except StrictDataclassError as error:
        raise ValueError(f"model {model}: transformers refuses its config.json: {error}") from error
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError(
            f"model {model} is saved quantised; give the configuration of the original model, and "
            "choose the quantisation here."
        )
    return config


def load_values(model: str) -> dict[str, Any]:
    """Return the values of a model's configuration, as `load_config` finds it."""
    return {k: v for k, v in load_config(model).to_dict().items() if k != "_name_or_path"}


def make_config(values: dict[str, Any], max_length: int = 0) -> "PreTrainedConfig":
    """Return the configuration with these values, without a cache, for rows up to `max_length`."""
    from transformers import AutoConfig

    config: PreTrainedConfig = AutoConfig.for_model(**(values | {"use_cache": False}))
    if getattr(config, "max_position_embeddings", max_length) < max_length:
        config.max_position_embeddings = max_length
    return config


def make_skeleton(config: "PreTrainedConfig", name: str, dtype: torch.dtype) -> "PreTrainedModel":
    """Return the model without weights, on the meta device; `name` is for messages."""
    from transformers import AutoModelForCausalLM

    try:
        model: PreTrainedModel = empty_model(
            AutoModelForCausalLM, config, dtype=dtype, attn_implementation="sdpa"
        )
    except ValueError as error:
        if "Unrecognized configuration class" not in str(error):
            raise
        raise ValueError(
            f"model {name}: {config.model_type!r} is no causal language model; choose one that is."
        ) from error
    return model


def quantize_(model: Any, quantization: str, dtype: torch.dtype) -> None:
    """Put bitsandbytes' 4-bit layers in place of every linear layer but the head, without weights.

    The model is on the meta device; `dtype` is that of the products.
    """
    check_quantizable(quantization, model.config, "the model", option="quantization")
    from transformers.integrations import replace_with_bnb_linear

    from pacatune.tuner.quantized import forbid_packing

    head = model.get_output_embeddings()
    config = bitsandbytes_config(quantization, dtype)
    left = [name for name, module in model.named_modules() if module is head]
    replace_with_bnb_linear(model, modules_to_not_convert=left, quantization_config=config)
    forbid_packing(model)
    model.is_loaded_in_4bit = model.is_quantized = True


def is_4bit(module: nn.Module) -> bool:
    """Whether a module is one of bitsandbytes' 4-bit layers."""
    kind = type(module)
    return kind.__name__ == "Linear4bit" and kind.__module__.startswith("bitsandbytes.")


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
    model does and something more. Weights are random; with `quantization` (nf4 or fp4) no more
    than one layer is ever there unquantised. `max_length` is the length of the longest row.
    """
    model: Any = make_skeleton(make_config(values, max_length), values["model_type"], dtype)
    if quantization is not None:
        quantize_(model, quantization, dtype)
    torch.manual_seed(seed)
    for module in model.modules():
        if is_4bit(module):
            _fill_quantized(model, module, dtype, device)
        elif any(tensor.is_meta for tensor in _own_tensors(module)):
            module.to_empty(device=device, recurse=False)
            with torch.no_grad():
                for tensor in _own_tensors(module):
                    tensor.zero_()  # in case the model's own rule forgets one
                model._init_weights(module)
    model.tie_weights()
    model.enable_input_require_grads()
    return cast(nn.Module, model)


def _fill_quantized(model: Any, layer: Any, dtype: torch.dtype, device: torch.device) -> None:
    from bitsandbytes.nn.modules import Params4bit

    std = getattr(model.config, "initializer_range", 0.02)
    weight = torch.empty(layer.out_features, layer.in_features, dtype=dtype, device=device)
    make: Any = Params4bit
    layer.weight = make(weight.normal_(std=std), **vars(layer.weight)).to(device)
    if layer.bias is not None:
        layer.bias = nn.Parameter(torch.zeros(layer.out_features, dtype=dtype, device=device))


def _own_tensors(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(recurse=False), *module.buffers(recurse=False)]


def make_batch(num_rows: int, num_tokens: int, vocab_size: int, seed: int) -> Tensor:
    """Return (B, T) random tokens below `vocab_size`."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(vocab_size, (num_rows, num_tokens), generator=generator, device="cpu")


def loss_of(model: nn.Module, batch: Tensor) -> Tensor:
    """Return the loss of (B, T) tokens, each of which learns the next one."""
    loss: Tensor = model(input_ids=batch, labels=batch).loss
    return loss


def loss_of_graph(model: nn.Module, batch: Tensor) -> Tensor:
    """Return the same of a compiled model, whose graph begins after the embeddings.

    That their output asks for a gradient is no operation which a graph could hold: it would be cut
    into three.
    """
    embed: Any = cast(Any, model).get_input_embeddings()
    loss: Tensor = model(inputs_embeds=embed(batch), labels=batch).loss
    return loss


def checkpoint_blocks(model: Any) -> None:
    """Let each block keep its inputs only."""
    # Renamed within version 5 of transformers.
    enable = getattr(model, "activation_checkpointing_enable", None)
    (enable or model.gradient_checkpointing_enable)({"use_reentrant": False})
