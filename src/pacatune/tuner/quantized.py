"""QPaCA: an adapted linear layer whose base weight is kept in few bits.

Training dequantises the weight in each pass, which is what the base layer's own forward does as
well, so the adapted columns cost one small write and no GEMM; x[..., indices] is all that is kept
for backward. Everything that the base layer must do itself (inference by its own kernels, hooks,
weights that cannot be dequantised) takes the additive form of `linear.py`.
"""

import copy
import json
import warnings
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import safe_open
from torch import Tensor, nn

from pacatune.format.options import format_quantization
from pacatune.grid.layers import PackedLinear
from pacatune.names import find_name, names_of
from pacatune.ops.columns import read_columns
from pacatune.ops.products import autocast
from pacatune.ops.quantized import paca_quantized_linear
from pacatune.ops.whole import is_shared_out
from pacatune.tuner.compat import resolve_quantization_backend
from pacatune.tuner.config import PacaConfig
from pacatune.tuner.layout import layout_of
from pacatune.tuner.linear import Linear

# Keeps bitsandbytes' 4-bit weights as they are on CPUs with AVX-512 BF16.
#
# There bitsandbytes reorders a weight in place the first time its layer is evaluated. That rounds
# the scales to bfloat16, so the base is another one afterwards; the reordered weight passes no
# gradient back, so a model that is evaluated before training cannot be trained; and saving it
# spoils the scales. `support_avx512bf16_for_cpu` decides about it and about nothing else. It stays
# off when the adapter is unloaded: the base is then what it was.


_SWITCH = "support_avx512bf16_for_cpu"


def forbid_packing(model: nn.Module) -> None:
    """Let every 4-bit layer keep its weight in the common order; put back what is reordered."""
    for module in model.modules():
        if getattr(module, _SWITCH, False):
            _unpack(cast(Any, module))
            setattr(module, _SWITCH, False)


def _unpack(layer: Any) -> None:
    state = getattr(layer.weight, "quant_state", None)
    if getattr(state, "packing_format_for_cpu", False):
        layer.state_dict()  # unpacks on the way
        state = layer.weight.quant_state
        if state.absmax.dim() == 2:  # bitsandbytes 0.50 leaves the scales transposed here
            state.absmax = state.absmax.t().reshape(-1).float()


# Reads columns of the weights that a quantised model was made from, out of its checkpoint.


_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_FIX = "use `columns_from='dequantized'`, which needs no checkpoint."
# Rounding to 4 bits moves a weight by a tenth of their size; other weights, by more than it.
_MOST_DIFFERENCE = 0.5


class OriginalWeights:
    """The safetensors checkpoint that a quantised transformers model was loaded from."""

    def __init__(self, model: nn.Module) -> None:
        self.name = getattr(model, "name_or_path", None) or ""
        self.prefix = getattr(model, "base_model_prefix", "")
        self.files = self._find_files() if self.name else {}
        if not self.files:
            raise ValueError(
                f"`columns_from` ('original'): no safetensors checkpoint at {self.name!r}, where "
                f"this model was loaded from; {_FIX}"
            )

    def columns(self, module_name: str, indices: Tensor, *, like: Tensor) -> Tensor:
        """Read the (O, R) columns of one weight, in float32 and where `like` is.

        `like` is the (O, I) weight as the model has it, dequantised.
        """
        key = self._find_key(f"{module_name}.weight")
        with safe_open(self.files[key], framework="pt") as file:
            weight = file.get_tensor(key)
        if not weight.is_floating_point() or weight.shape != like.shape:
            raise ValueError(
                f"`columns_from` ('original'): {key!r} in {self.name} is {tuple(weight.shape)} of "
                f"{weight.dtype}, not the {tuple(like.shape)} weight before quantisation; {_FIX}"
            )
        columns = read_columns(weight, indices.cpu()).float().to(like.device)
        rounded = read_columns(like, indices)
        difference = (columns - rounded).norm() / columns.norm().clamp_min(1e-30)
        if not difference < _MOST_DIFFERENCE:
            raise ValueError(
                f"`columns_from` ('original'): {key!r} in {self.name} differs from the quantised "
                f"weight by {difference:.0%} of its size; it is not what this model was quantised "
                f"from. Load the base from its own checkpoint, or {_FIX}"
            )
        return columns

    def _find_key(self, name: str) -> str:
        key = find_name(names_of(name, self.prefix), self.files)
        if key is None:
            raise ValueError(
                f"`columns_from` ('original'): {self.name} holds no {name!r} (transformers may "
                f"have fused or renamed it on loading); {_FIX}"
            )
        return key

    def _find_files(self) -> dict[str, str]:
        """Map each tensor of the checkpoint to its file."""
        single = self._cached(_SINGLE)
        if single is not None:
            with safe_open(single, framework="pt") as file:
                return dict.fromkeys(file.keys(), single)
        index = self._cached(_INDEX)
        if index is None:
            return {}
        names: dict[str, str] = json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"]
        paths = {name: self._cached(Path(name).name) for name in set(names.values())}
        return {key: path for key, name in names.items() if (path := paths[name]) is not None}

    def _cached(self, file: str) -> str | None:
        from transformers.utils import cached_file

        try:
            path: str | None = cached_file(self.name, file)
        except (OSError, ValueError):  # not a name that a hub could have
            return None
        return path


class QuantizedLinear(Linear):
    """An adapted linear layer of bitsandbytes, torchao, HQQ or another of PEFT's backends."""

    def _attach(self) -> None:
        pass  # a weight of few bits is never written

    def _fast_forward(self, x: Tensor) -> Tensor | None:
        update = self._single_update()
        backend, base_layer = self.quantization_backend, cast(Any, self.base_layer)
        is_packed = isinstance(base_layer, PackedLinear)  # evaluation has no kernels of its own
        if update is None or not (torch.is_grad_enabled() or is_packed):
            return None
        if not backend.supports_merge:
            return None
        dtype, multiply = getattr(base_layer, "compute_dtype", None) or x.dtype, None
        dequantize: Callable[[torch.dtype], Tensor] = partial(dequantized, backend, base_layer)
        if is_packed:  # columns are put into what a dequantised model holds, and cast with it
            x, dequantize = autocast(x), lambda _: base_layer.weight
            dtype = x.dtype
        if backend.backend_name == "bnb 8bit":
            # Its kernel rounds x to 8 bits too; alone, it would keep all of x for backward.
            dtype, multiply = x.dtype, base_layer.forward
        bias = base_layer.bias
        if bias is not None and multiply is None:
            bias = bias.to(dtype)
        result = paca_quantized_linear(x.to(dtype), update, dequantize, bias, multiply)
        return result.to(x.dtype)

    def _get_base_layer_device_and_dtype(self, base_layer: Any) -> Any:
        if isinstance(base_layer, PackedLinear):  # without decoding it
            return base_layer.blocks.device, base_layer.dtype
        return super()._get_base_layer_device_and_dtype(base_layer)

    def _weight_to_merge(self) -> Tensor:
        if isinstance(self.get_base_layer(), PackedLinear):
            raise ValueError(
                "Cannot merge into a weight that stays in the blocks of its file; `pacatune merge` "
                "writes the trained columns into a copy of the file."
            )
        return super()._weight_to_merge()


def dequantized(backend: Any, base_layer: Any, dtype: torch.dtype) -> Tensor:
    """Return the (O, I) weight of a quantised layer as a new tensor."""
    weight: Tensor
    if backend.backend_name == "bnb 4bit":
        from bitsandbytes.functional import dequantize_4bit

        # A parameter that FSDP has gathered has lost its state; the module keeps it.
        state = getattr(base_layer.weight, "quant_state", None) or base_layer.quant_state
        weight = dequantize_4bit(base_layer.weight.data, state)
    else:
        weight = backend.get_base_weight(base_layer)
    return weight.to(dtype)


def weight_matrix(module: Any, parameter_name: str = "weight", **kwargs: Any) -> Tensor:
    """Return the weight of a target as a matrix, dequantised if it is held in few bits."""
    backend = resolve_quantization_backend(module, **kwargs)
    if backend is not None and not backend.supports_merge:
        raise ValueError(
            f"`selection` looks at the weights, and those of a "
            f"{type(module).__name__} ({backend.backend_name}) cannot be dequantised; choose by "
            "something else."
        )
    if backend is not None:
        return dequantized(backend, module, torch.float32)
    weight: Tensor = getattr(module, parameter_name)
    if is_shared_out(weight):
        raise ValueError(
            f"`selection` looks at the weights, and those of a "
            f"{type(module).__name__} are sharded; choose columns before the model is "
            "sharded."
        )
    layout = layout_of(module, parameter_name)
    assert layout is not None, "check_targets refuses what has none"
    return layout.matrix(weight.detach())


# What an adapter on a quantised base remembers: how that was rounded, where its columns started.
#
#     dequantized   W[:, indices] of the quantised base; delta starts at zero
#     original      the columns of the checkpoint before quantisation; delta starts at what rounding
#                   took away, so that the columns are exact from the first step on
#
# An `original` adapter therefore fits one rounding of the base only, and says so when it is loaded.


Quantization = dict[str, Any]
"""What adapter_config.json says of the base: `method`, then what that method needs to repeat it."""


def find_originals(model: nn.Module, config: PacaConfig, **kwargs: Any) -> OriginalWeights | None:
    """Open the checkpoint of a new adapter whose columns start from it; None where none does."""
    if config.columns_from != "original" or config.base_quantization or not config.init_weights:
        return None
    if 0 in (config.paca_alpha, *(config.alpha_pattern or {}).values()):
        raise ValueError(
            "`columns_from` ('original') starts from an update, which `paca_alpha` (0) would take "
            "away again; give another alpha."
        )
    if all(resolve_quantization_backend(module, **kwargs) is None for module in model.modules()):
        raise ValueError(
            "`columns_from` ('original') is for quantised bases, and this one is not: its columns "
            "are the original ones. Drop the option."
        )
    return OriginalWeights(model)


def settle_columns(
    model: nn.Module, config: PacaConfig, adapter_name: str, originals: OriginalWeights | None
) -> PacaConfig:
    """Start a new adapter's columns where its configuration says, or check a loaded one's base.

    Returns the configuration to save: the same, or a copy that names the quantisation.
    """
    layers = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, QuantizedLinear) and adapter_name in module.r
    }
    current = describe(layers.values())
    if config.base_quantization is not None:
        _check_base(config, current)
        return config
    if originals is not None:
        _start_from(originals, layers, adapter_name)
    if current is None:
        return config
    config = copy.copy(config)
    config.base_quantization = current
    return config


def describe(layers: Iterable[QuantizedLinear]) -> Quantization | None:
    """Return how the bases of adapted layers are quantised, None if none is."""
    found: Quantization | None = None
    for layer in layers:
        if isinstance(layer.get_base_layer(), PackedLinear):  # the same as the dequantised model
            continue
        one = _describe_one(layer.quantization_backend, layer.get_base_layer())
        if found is not None and one != found:
            raise ValueError(
                f"The target modules are quantised in different ways ({format_quantization(found)} "
                f"and {format_quantization(one)}); one adapter can be on one kind only. Choose "
                "`target_modules` of one kind."
            )
        found = one
    return found


def _describe_one(backend: Any, base_layer: Any) -> Quantization:
    name = str(backend.backend_name)
    weight = getattr(base_layer, "weight", None)
    if name == "bnb 4bit":
        state = getattr(weight, "quant_state", None) or base_layer.quant_state
        return {
            "method": "bitsandbytes",
            "type": state.quant_type,
            "block_size": state.blocksize,
            "double": bool(state.nested),
        }
    if name == "bnb 8bit":
        return {"method": "bitsandbytes", "type": "int8"}
    if name == "hqq":
        options = base_layer.quant_config["weight_quant_params"]
        return {"method": "hqq", "bits": options["nbits"], "group_size": options["group_size"]}
    if name == "torchao":
        blocks = list(getattr(weight, "block_size", None) or [])
        if blocks and blocks[-1] == base_layer.weight.shape[-1]:
            blocks[-1] = "row"  # one scale for a whole row, whatever the layer's size
        return {
            "method": "torchao",
            "type": type(weight).__name__,
            "dtype": str(getattr(weight, "target_dtype", "")).removeprefix("torch."),
            "block_size": blocks or None,
        }
    return {"method": name}


def _check_base(config: PacaConfig, current: Quantization | None) -> None:
    recorded = config.base_quantization
    if recorded == current:
        return
    assert recorded is not None
    before = format_quantization(recorded)
    here = f"quantised as {format_quantization(current)!r}" if current else "not quantised"
    if config.columns_from == "original":
        raise ValueError(
            f"The adapter was trained on a base quantised as {before!r}, with columns that start "
            f"from the original weights; this base is {here}, where its update would be wrong. "
            "Load the base as it was, or merge the adapter with `pacatune merge --base original`."
        )
    warnings.warn(
        f"The adapter was trained on a base quantised as {before!r}; this one is {here}, so its "
        "outputs differ by the rounding of the weights.",
        stacklevel=2,
    )


@torch.no_grad()
def _start_from(
    originals: OriginalWeights, layers: dict[str, QuantizedLinear], adapter_name: str
) -> None:
    for name, layer in layers.items():
        delta, indices, scaling, _ = layer.update_of(adapter_name)
        rounded = dequantized(layer.quantization_backend, layer.base_layer, torch.float32)
        columns = originals.columns(name, indices, like=rounded)
        delta.copy_((columns - read_columns(rounded, indices)) / scaling)
