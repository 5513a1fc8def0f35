"""PEFT before 0.21: what our tuner and its layers need of it, in one piece that can be cut out.

    PEFT 0.21         a tuner says what is saved and loaded; columns are not cast to floats;
                      a merged adapter is not deleted
    PEFT 0.20         backends of quantised layers
    PEFT 0.19         each adapter in float32

`compat.py` takes nothing of this where PEFT has what we need.
"""

import contextvars
import functools
import inspect
import re
import sys
from collections.abc import Callable
from typing import Any, cast

import torch
from peft import PeftModel, mapping
from peft.tuners import tuners_utils
from peft.tuners._buffer_dict import BufferDict
from peft.utils import save_and_load
from torch import Tensor, nn

from pacatune.installation import require

# Quantised layers. Those of bitsandbytes are what users of old releases have; the others need a
# newer PEFT.


class _Bitsandbytes:
    """Reads and replaces the weight of a layer of bitsandbytes, as PEFT's own backends do."""

    layer_type = "linear"
    supports_merge = True

    def __init__(self, num_bits: int) -> None:
        self.num_bits = num_bits
        self.backend_name = f"bnb {num_bits}bit"

    def get_base_weight(self, base_layer: Any) -> Tensor:
        """Return the (O, I) weight as a new tensor."""
        from peft.utils.integrations import dequantize_bnb_weight

        weight = base_layer.weight
        state = getattr(weight, "quant_state", None)
        if self.num_bits == 8:
            state = base_layer.state
            if state.SCB is None:
                state.SCB = weight.SCB
        return cast(Tensor, dequantize_bnb_weight(weight, state=state))

    def set_base_weight(self, layer: Any, weight: Tensor) -> None:
        """Quantise a weight and put it into a layer's base layer."""
        base_layer = layer.get_base_layer()
        old = base_layer.weight
        if self.num_bits == 8:
            options = {"has_fp16_weights": old.has_fp16_weights}
        else:
            options = {k: v for k, v in vars(old).items() if not k.startswith("_") and k != "data"}
            options["bnb_quantized"] = False
        options["requires_grad"] = False
        base_layer.weight = type(old)(weight.to("cpu"), **options).to(old.device)
        if self.num_bits == 8:
            base_layer.state.reset_grads()

    def maybe_clone_base_result(self, result: Tensor) -> Tensor:
        """Return what can be added to: a 4-bit layer returns a view."""
        return result.clone() if self.num_bits == 4 else result


def resolve_quantization_backend(base_layer: nn.Module, **kwargs: Any) -> Any:
    """Return what reads the weight of a quantised layer; None for the others."""
    kinds = {"Linear4bit": 4, "Linear8bitLt": 8}
    for kind in type(base_layer).__mro__:
        if kind.__name__ in kinds and kind.__module__.startswith("bitsandbytes"):
            return _Bitsandbytes(kinds[kind.__name__])
    is_hqq = type(base_layer).__name__ == "HQQLinear"
    if is_hqq or type(getattr(base_layer, "weight", None)).__module__.startswith("torchao."):
        library = "HQQ" if is_hqq else "torchao"
        require("PEFT", "0.20", f"Adapting a {type(base_layer).__name__} of {library}")
    return None


def get_quantization_kwargs(model: Any) -> dict[str, Any]:
    """Return what the other two need of a model: nothing."""
    return {}


def quantization_extra_repr(module: Any) -> str:
    """Name the backend of a layer."""
    backend = module.quantization_backend
    return "" if backend is None else f"quantization_backend={backend.backend_name!r}"


class OldTunerLayer(tuners_utils.BaseTunerLayer):
    """PEFT's, with backends of quantised layers."""

    quantization_backend: Any = None

    def get_base_weight(self) -> Tensor:
        """Return the base layer's weight, dequantised."""
        base_layer = self.get_base_layer()
        if self.quantization_backend is None:
            return cast(Tensor, base_layer.weight.data)
        return cast(Tensor, self.quantization_backend.get_base_weight(base_layer))

    def set_base_weight(self, weight: Tensor) -> None:
        """Give the base layer a weight, quantised as the old one."""
        if self.quantization_backend is None:
            self.get_base_layer().weight.data = weight
        else:
            self.quantization_backend.set_base_weight(self, weight)

    def _get_base_layer_device_and_dtype(self, base_layer: Any) -> tuple[Any, Any]:
        for name in ("weight", "qweight"):
            if (weight := getattr(base_layer, name, None)) is not None:
                return weight.device, getattr(base_layer, "compute_dtype", None) or weight.dtype
        return None, getattr(base_layer, "compute_dtype", None)

    def _move_adapter_to_device_of_base_layer(
        self, adapter_name: str, device: torch.device | None = None
    ) -> None:
        """Move an adapter beside its base layer; columns stay int64."""
        base_layer = self.get_base_layer()
        found, dtype = self._get_base_layer_device_and_dtype(base_layer)
        device = found if device is None else device
        if device is None:
            return
        for name in self.adapter_layer_names + self.other_param_names:
            held = getattr(self, name, None)
            if not isinstance(held, nn.ModuleDict | nn.ParameterDict | BufferDict):
                continue
            if adapter_name not in held or any(p.is_meta for p in _tensors(held[adapter_name])):
                continue
            one = held[adapter_name]
            is_cast = isinstance(one, nn.Module) or one.is_floating_point()
            is_cast = is_cast and dtype is not None and dtype.is_floating_point
            held[adapter_name] = one.to(device, dtype) if is_cast else one.to(device)


def _tensors(one: Any) -> list[Tensor]:
    return list(one.parameters()) if isinstance(one, nn.Module) else [one]


# Saving and loading (PEFT 0.21): the tuner selects its tensors and translates their names. Older
# ones look for the prefix in every name instead.


# PEFT < 0.19 leaves every adapter but the first in the dtype of the base.
_CASTS_ALL = "autocast_adapter_dtype" in inspect.signature(PeftModel.add_adapter).parameters


class OldTuner(tuners_utils.BaseTuner):
    """PEFT's, which selects its tensors and translates their names."""

    def inject_adapter(
        self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any
    ) -> None:
        """Put an adapter into a model, in float32."""
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        if not _CASTS_ALL and len(self.peft_config) > 1:
            self._cast_adapter_dtype(adapter_name=adapter_name)

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter that is not merged."""
        layers = (m for m in self.model.modules() if isinstance(m, tuners_utils.BaseTunerLayer))
        if any(adapter_name in layer.merged_adapters for layer in layers):
            raise ValueError(
                f"Cannot delete adapter(s) {[adapter_name]} while they are merged. Please unmerge "
                "them first."
            )
        super().delete_adapter(adapter_name)

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: Any,
        config: Any,
        adapter_name: str,
        state_dict: dict[str, Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, Tensor]:
        names = _names_of_tensors(model, adapter_name)
        selected = {name: value for name, value in state_dict.items() if name in names}
        bias = getattr(config, "bias", "none")
        if bias == "all":
            selected |= {k: v for k, v in state_dict.items() if f".{k}".endswith(".bias")}
        elif bias != "none":
            for name, module in model.named_modules():
                key = f"{name}.base_layer.bias".removeprefix(".")
                if isinstance(module, tuners_utils.BaseTunerLayer) and key in state_dict:
                    selected[key] = state_dict[key]
        return selected

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        return re.sub(rf"\.{re.escape(adapter_name)}(\.[^.]+)?$", r"\1", key)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: Any, config: Any, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        keys: dict[str, str] = {}
        for name in _names_of_tensors(model, adapter_name):
            key = cls._remove_adapter_name_from_key(name, adapter_name)
            keys |= {key: name, f"base_model.model.{key}": name}
        return {keys.get(key, key): value for key, value in state_dict.items()}


def _names_of_tensors(model: Any, adapter_name: str | None = None) -> set[str]:
    """Return the names, in a state_dict, of one adapter's deltas and columns, or of all."""
    names = set()
    for prefix, module in model.named_modules():
        if isinstance(module, tuners_utils.BaseTunerLayer) and hasattr(module, "paca_delta"):
            for adapter in module.paca_delta if adapter_name is None else (adapter_name,):
                kinds = [name for name, _ in module.paca_delta[adapter].named_parameters()]
                tensors = [f"paca_delta.{adapter}.{kind}" for kind in kinds]
                tensors.append(f"paca_indices.{adapter}")
                names |= {f"{prefix}.{tensor}".removeprefix(".") for tensor in tensors}
    return names


_NAME, _PREFIX = "PACA", "paca_"
_Remap = Callable[[dict[str, Tensor]], dict[str, Tensor]]
_remap: contextvars.ContextVar[_Remap | None] = contextvars.ContextVar("_remap", default=None)


def teach_saving() -> None:
    """Let an old PEFT ask our tuner what is saved and loaded, as PEFT 0.21 does of itself."""
    if hasattr(save_and_load.get_peft_model_state_dict, "knows_paca"):
        return
    insert = save_and_load._insert_adapter_name_into_state_dict

    @functools.wraps(insert)
    def insert_names(state_dict: dict[str, Tensor], *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        remap = _remap.get()
        if remap is not None:
            return remap(state_dict)
        return cast(dict[str, Tensor], insert(state_dict, *args, **kwargs))

    save_and_load._insert_adapter_name_into_state_dict = insert_names
    _replace_everywhere("get_peft_model_state_dict", _saving)
    _replace_everywhere("set_peft_model_state_dict", _loading)


def _replace_everywhere(name: str, wrap: Callable[[Any], Any]) -> None:
    """Replace a function of PEFT in every module that has imported it by its name."""
    original = getattr(save_and_load, name)
    ours: Any = functools.wraps(original)(wrap(original))
    ours.knows_paca = True
    for module in tuple(sys.modules.values()):
        if getattr(module, "__dict__", {}).get(name) is original:
            setattr(module, name, ours)


def _saving(original: Any) -> Any:
    def get_peft_model_state_dict(
        model: Any,
        state_dict: dict[str, Tensor] | None = None,
        adapter_name: str = "default",
        unwrap_compiled: bool = False,
        save_embedding_layers: bool | str = "auto",
        **kwargs: Any,
    ) -> dict[str, Tensor]:
        if unwrap_compiled:
            model = getattr(model, "_orig_mod", model)
        config = model.peft_config[adapter_name]
        options = {"save_embedding_layers": save_embedding_layers, **kwargs}
        if config.peft_type != _NAME:
            return cast(
                dict[str, Tensor], original(model, state_dict, adapter_name, False, **options)
            )
        if state_dict is None:
            state_dict = model.state_dict()
        tuner: Any = mapping.PEFT_TYPE_TO_TUNER_MAPPING[config.peft_type]
        ours = tuner._get_adapter_state_dict(
            model=model,
            config=config,
            adapter_name=adapter_name,
            state_dict=state_dict,
            unwanted_adapter_names=[name for name in model.peft_config if name != adapter_name],
        )
        everyone = _names_of_tensors(model)
        others = {name: value for name, value in state_dict.items() if name not in everyone}
        saved = original(model, others, adapter_name, False, **options)
        # Names of the base that contain the prefix; auxiliary modules are saved under others.
        for name in others:
            if _PREFIX in name:
                saved.pop(tuner._remove_adapter_name_from_key(name, adapter_name), None)
        translated = {
            tuner._remove_adapter_name_from_key(name, adapter_name): value
            for name, value in ours.items()
        }
        return {**translated, **saved}

    return get_peft_model_state_dict


def _loading(original: Any) -> Any:
    def set_peft_model_state_dict(
        model: Any,
        peft_model_state_dict: dict[str, Tensor],
        adapter_name: str = "default",
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        config = model.peft_config[adapter_name]
        if config.peft_type != _NAME:
            return original(model, peft_model_state_dict, adapter_name, *args, **kwargs)
        tuner: Any = mapping.PEFT_TYPE_TO_TUNER_MAPPING[config.peft_type]

        def remap(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
            remapped: dict[str, Tensor] = tuner._remap_adapter_state_dict_for_load(
                model=model, config=config, adapter_name=adapter_name, state_dict=state_dict
            )
            return remapped

        token = _remap.set(remap)
        try:
            return original(model, peft_model_state_dict, adapter_name, *args, **kwargs)
        finally:
            _remap.reset(token)

    return set_peft_model_state_dict
