"""The PEFT tuner: finds the target modules, replaces them, and answers for the adapter as a whole."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import (
    TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING,
    get_quantization_kwargs,
)
from peft.utils.other import AuxiliaryTrainingWrapper, get_pattern_key
from peft.utils.quantization_utils import resolve_quantization_backend
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from pacatune.tuner.config import PacaConfig
from pacatune.tuner.layer import Linear, PacaLayer

__all__ = ["PacaModel"]


class PacaModel(BaseTuner):
    """Trains `r` columns of each target weight in place.

    Made by `peft.get_peft_model(model, PacaConfig(...))`; everything PEFT offers for its own methods works on it.
    """

    prefix = "paca_"
    tuner_layer_cls = PacaLayer
    target_module_mapping = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.copy()

    def inject_adapter(self, model: nn.Module, adapter_name: str, **kwargs: Any) -> None:
        """Put the adapter's layers into `model`; then see which weights are shared."""
        super().inject_adapter(model, adapter_name, **kwargs)
        mark_shared_weights(model)

    def _create_and_replace(
        self,
        peft_config: PacaConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        ranks = {
            "r": _for_module(peft_config.rank_pattern, current_key, peft_config.r),
            "paca_alpha": _for_module(
                peft_config.alpha_pattern, current_key, peft_config.paca_alpha
            ),
        }
        if isinstance(target, PacaLayer):
            target.update_layer(adapter_name, current_key, peft_config, **ranks)
            return
        kwargs = get_quantization_kwargs(self)
        check_supported(target, current_key, **kwargs)
        layer = Linear(target, adapter_name, current_key, peft_config, **ranks, **kwargs)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        """Map `...paca_delta.<adapter>.weight` to the file's `...paca_delta`."""
        key = super()._remove_adapter_name_from_key(key, adapter_name)
        return re.sub(r"(^|\.)paca_delta\.weight$", r"\1paca_delta", key)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Hand `adapter_names` of a mixed batch to every adapted layer for one call."""
        adapter_names = kwargs.get("adapter_names")
        if adapter_names is None:
            yield
            return
        if self.training:
            raise ValueError("Cannot pass `adapter_names` when the model is in training mode.")
        self._check_adapter_names(adapter_names)
        num_beams = kwargs.get("num_beams") or 1
        repeated = [name for name in adapter_names for _ in range(num_beams)]
        layers = (PacaLayer, AuxiliaryTrainingWrapper)
        handles = [
            _pass_names(module, repeated) for module in self.modules() if isinstance(module, layers)
        ]
        encoder = _encoder_of(self.model)
        if num_beams > 1 and encoder is not None:  # an encoder sees each sample once
            handles += [
                _pass_names(module, adapter_names)
                for module in encoder.modules()
                if isinstance(module, layers)
            ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _check_adapter_names(self, adapter_names: list[str]) -> None:
        known = {"__base__"}
        for module in self.modules():
            if isinstance(module, PacaLayer):
                known |= set(module.paca_delta.keys())
        unknown = set(adapter_names) - known
        if unknown:
            raise ValueError(
                f"Trying to infer with non-existing adapter(s): {', '.join(sorted(unknown))}"
            )


def check_supported(module: nn.Module, name: str, **kwargs: Any) -> None:
    """Refuse a module that PaCA cannot adapt.

    Args:
        module: The target.
        name: Its name in the model.
        **kwargs: What PEFT needs to recognise quantised layers.

    Raises:
        TypeError: If the module is not a linear layer of a supported kind.
        ValueError: If its weight is parametrised.
    """
    base = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
    if hasattr(base, "parametrizations"):
        raise ValueError(
            f"Target module {name!r} has a parametrised weight "
            f"({', '.join(sorted(base.parametrizations))}); its columns cannot be trained in place. Call "
            "torch.nn.utils.parametrize.remove_parametrizations first, or drop it from `target_modules`."
        )
    if isinstance(base, (nn.Linear, Conv1D)):
        return
    if resolve_quantization_backend(base, **kwargs) is None:
        raise TypeError(
            f"Target module {name!r} ({type(base).__name__}) is not supported. PaCA adapts "
            "torch.nn.Linear, transformers' Conv1D and quantised linear layers."
        )


def mark_shared_weights(model: nn.Module) -> None:
    """Find adapted weights that another module sees as well (tied embeddings); they stay untouched."""
    owners: dict[int, list[nn.Module]] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None and not parameter.is_meta:
                owners.setdefault(_address(parameter), []).append(module)
    for layer in model.modules():
        if isinstance(layer, PacaLayer):
            weight = layer.base_layer._parameters.get("weight")
            if weight is not None and len(owners.get(_address(weight), ())) > 1:
                layer.shares_weight = True
                if layer.residency is not None:
                    layer.residency.is_blocked = True


def _address(parameter: Tensor) -> int:
    """What two tensors over one memory have in common."""
    try:
        return parameter.untyped_storage().data_ptr() or id(parameter)
    except (NotImplementedError, RuntimeError):  # tensor subclasses without a storage of their own
        return id(parameter)


def _for_module(patterns: dict[str, Any] | None, name: str, default: Any) -> Any:
    if not patterns:
        return default
    return patterns.get(get_pattern_key(patterns.keys(), name), default)


def _pass_names(module: nn.Module, adapter_names: list[str]) -> Any:
    return module.register_forward_pre_hook(
        partial(_add_names, adapter_names=adapter_names), with_kwargs=True
    )


def _add_names(
    module: nn.Module, args: Any, kwargs: dict[str, Any], *, adapter_names: list[str]
) -> tuple[Any, dict[str, Any]]:
    kwargs["adapter_names"] = adapter_names
    return args, kwargs


def _encoder_of(model: nn.Module) -> nn.Module | None:
    get_encoder = getattr(model, "get_encoder", None)
    encoder = get_encoder() if get_encoder is not None else None
    return encoder if encoder is not model else None
