"""MosLoRA: LoRA with a trained r x r mixer between its two factors.

    y = x W^T + s dropout(x) A^T M^T B^T        A (R, I), M (R, R), B (O, R); s = lora_alpha / r

B starts at zero, so an untrained adapter changes nothing. Everything but the mixer is PEFT's LoRA,
whose layers take it as a variant. The adapter has a `peft_type` of its own, MOSLORA, because PEFT
alone would read a LORA file with a mixer in it, leave the mixer out and say nothing; as it is, it
refuses. `pacatune export --to lora` writes B M in place of B: the same function, plain LoRA.

Source: T. Wu et al., Mixture-of-Subspaces in Low-Rank Adaptation, arXiv 2406.11909.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from peft import mapping
from peft.tuners.lora import LoraConfig, LoraModel
from peft.tuners.lora.layer import Linear as LoraLinear
from peft.tuners.lora.layer import LoraLayer, LoraVariant
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.peft_types import PeftType, register_peft_method
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from pacatune.installation import require
from pacatune.tuner.compat import lora_variants
from pacatune.tuner.registration import ensure_peft_type

_NAME = "MOSLORA"
_INITS: dict[str, Callable[[Tensor], Any]] = {
    "kaiming": lambda weight: nn.init.kaiming_uniform_(weight, a=math.sqrt(5)),
    "orthogonal": nn.init.orthogonal_,
}
# Sums of adapters that stay exact: PEFT puts the factors side by side, or decomposes the sum.
_COMBINATIONS = ("cat", "svd")

ensure_peft_type(_NAME)


@dataclass
class MosLoraConfig(LoraConfig):
    """Configure MosLoRA: the options of PEFT's LoraConfig, and how the mixer starts.

    Raises:
        ValueError: If an option asks for another variant of LoRA at the same time, or for what a
            mixer cannot be in.
    """

    mixer_init: Literal["kaiming", "orthogonal"] = "kaiming"
    """How the mixer starts: `kaiming` (uniform, as A does; what the authors' code runs) or
    `orthogonal`, the paper's other choice."""

    def __post_init__(self) -> None:
        """Check what LoraConfig does not."""
        require("PEFT", "0.19", "MosLoRA")  # which hands the configuration to its layers
        super().__post_init__()
        self.peft_type = PeftType(_NAME)
        if self.mixer_init not in _INITS:
            raise ValueError(f"`mixer_init` ({self.mixer_init!r}) must be one of {list(_INITS)}.")
        if self.init_lora_weights not in (True, False, "gaussian"):
            raise ValueError(
                f"`init_lora_weights` ({self.init_lora_weights!r}) must be True, 'gaussian' or "
                "False: the others choose A and B for a product without a mixer between them."
            )
        for name in (
            *lora_variants(self),
            "use_qalora",
            "target_parameters",
            "ensure_weight_tying",
        ):
            if getattr(self, name, None):
                raise ValueError(
                    f"`{name}` ({getattr(self, name)!r}) cannot be used with MosLoRA; drop it, or "
                    "use LoraConfig."
                )


class MosLoraVariant(LoraVariant):
    """What PEFT's layers ask a variant of LoRA to do."""

    @staticmethod
    def init(module: Any, adapter_name: str, config: MosLoraConfig, **kwargs: Any) -> None:
        """Give an adapter its mixer."""
        rank = module.r[adapter_name]
        mixer = nn.Linear(rank, rank, bias=False)
        if not mixer.weight.is_meta:
            _INITS[config.mixer_init](mixer.weight)
        module.lora_mixer[adapter_name] = mixer
        module._move_adapter_to_device_of_base_layer(adapter_name)

    @staticmethod
    def forward(
        module: Any, active_adapter: str, x: Tensor, result: Tensor, **kwargs: Any
    ) -> Tensor:
        """Add s B M A dropout(x) to the base layer's output."""
        x = module.lora_A[active_adapter](module.lora_dropout[active_adapter](x))
        x = module.lora_B[active_adapter](module.lora_mixer[active_adapter](x))
        return result + x * float(module.scaling[active_adapter])

    @staticmethod
    def merge_safe(module: Any, active_adapter: str, orig_weight: Tensor) -> Tensor:
        """Return the weight with the adapter in it."""
        delta: Tensor = module.get_delta_weight(active_adapter)
        return orig_weight + delta.to(orig_weight.dtype)

    @staticmethod
    def merge_unsafe(module: Any, active_adapter: str, orig_weight: Tensor) -> None:
        """Add the adapter to the weight in place."""
        orig_weight.data += module.get_delta_weight(active_adapter).to(orig_weight.dtype)

    @staticmethod
    def unmerge(module: Any, active_adapter: str, orig_weight: Tensor) -> Tensor:
        """Return the weight without the adapter."""
        delta: Tensor = module.get_delta_weight(active_adapter)
        return orig_weight.data - delta.to(orig_weight.dtype)


class MosLoraLayer(LoraLayer):
    """Turns one of PEFT's LoRA layers into one with mixers; goes before it in the bases.

    Attributes:
        lora_mixer: Adapter name -> nn.Linear whose weight is M (R, R).
    """

    adapter_layer_names = (*LoraLayer.adapter_layer_names, "lora_mixer")

    def resolve_lora_variant(self, *, config: Any, **kwargs: Any) -> MosLoraVariant:
        """Return the variant, the same for every adapter."""
        return MosLoraVariant()

    def update_layer(self, *args: Any, **kwargs: Any) -> None:
        """Add an adapter, or replace the one of that name; see PEFT's."""
        if not hasattr(self, "lora_mixer"):
            self.lora_mixer = nn.ModuleDict({})
        super().update_layer(*args, **kwargs)

    def get_delta_weight(self, adapter: str) -> Tensor:
        """Return s B M A in the orientation of the base weight, and in the dtype of B."""
        factors = (self.lora_B[adapter], self.lora_mixer[adapter], self.lora_A[adapter])
        factor_b, mixer, factor_a = (cast(Tensor, factor.weight) for factor in factors)
        dtype = factor_b.dtype
        if factor_b.device.type == "cpu" and dtype in (torch.float16, torch.bfloat16):
            factor_b, mixer, factor_a = factor_b.float(), mixer.float(), factor_a.float()
        delta = factor_b @ (mixer @ factor_a) * float(self.scaling[adapter])
        return (delta.t() if getattr(self, "fan_in_fan_out", False) else delta).to(dtype)


class Linear(MosLoraLayer, LoraLinear):
    """An nn.Linear or Conv1D (transformers) with MosLoRA adapters."""


class MosLoraModel(LoraModel):
    """PEFT's LoRA tuner with layers that have mixers."""

    def _prepare_model(self, peft_config: MosLoraConfig, model: nn.Module) -> None:
        super()._prepare_model(peft_config, model)
        adapted: tuple[str, ...] = ()
        for name, module in model.named_modules():
            if isinstance(module, BaseTunerLayer):
                adapted += (f"{name}.",)
            elif not name.startswith(adapted) and self._check_target_module_exists(
                peft_config, name
            ):
                _layer_class(module, name)

    @staticmethod
    def _create_new_module(
        lora_config: MosLoraConfig, adapter_name: str, target: Any, **kwargs: Any
    ) -> nn.Module:
        base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        layer = _layer_class(base, kwargs["target_name"])
        is_conv1d = isinstance(base, Conv1D)
        new = layer(
            target,
            adapter_name,
            config=lora_config,
            is_target_conv_1d_layer=is_conv1d,
            **kwargs,
        )
        new.fan_in_fan_out = is_conv1d
        return cast(nn.Module, new)

    def add_weighted_adapter(
        self,
        adapters: list[str],
        weights: list[float],
        adapter_name: str,
        combination_type: str = "svd",
        **kwargs: Any,
    ) -> None:
        """Add the weighted sum of adapters as a new one: "cat" is exact, "svd" nearly so."""
        if combination_type not in _COMBINATIONS:
            raise ValueError(
                f"`combination_type` ({combination_type!r}) must be one of {_COMBINATIONS}: the "
                "others add A and B alone, which mean nothing without the mixer between them."
            )
        if adapter_name in self.peft_config:
            raise ValueError(f"`adapter_name` ({adapter_name!r}) is taken; delete it first.")
        if combination_type == "svd":
            require("PEFT", "0.21", "`combination_type` ('svd')")  # the others scale twice
        super().add_weighted_adapter(
            adapters,
            weights,
            adapter_name,
            combination_type=combination_type,
            **kwargs,
        )
        is_cat = combination_type == "cat" and len(adapters) > 1
        for layer in self.model.modules():
            if isinstance(layer, MosLoraLayer) and adapter_name in layer.lora_mixer:
                parts = [layer.lora_mixer[n].weight for n in adapters if n in layer.lora_mixer]
                _set_mixer(cast(Any, layer.lora_mixer[adapter_name]), parts if is_cat else None)


@torch.no_grad()
def _set_mixer(mixer: nn.Linear, parts: list[Any] | None) -> None:
    """Set a mixer to the identity, or to the mixers of adapters whose factors are side by side."""
    identity = torch.eye(len(mixer.weight))
    mixer.weight.copy_(identity)
    if parts is not None:
        block = torch.block_diag(*parts)
        mixer.weight[: len(block), : len(block)] = block.to(mixer.weight)


def _layer_class(base: nn.Module, name: str) -> Any:
    """Return the class that adapts a module."""
    kind = type(base)
    if kind.__module__.startswith("bitsandbytes."):
        from pacatune.tuner import moslora_bnb

        if kind.__name__ in ("Linear4bit", "LinearNF4", "LinearFP4"):
            return moslora_bnb.Linear4bit
        if kind.__name__ == "Linear8bitLt":
            return moslora_bnb.Linear8bitLt
    elif isinstance(base, nn.Linear | Conv1D) and not _is_quantised(base):
        return Linear
    raise TypeError(
        f"Target module {name!r} ({kind.__name__}) is not supported. MosLoRA adapts "
        "torch.nn.Linear, transformers' Conv1D and bitsandbytes' Linear4bit and Linear8bitLt."
    )


def _is_quantised(base: Any) -> bool:
    return not base.weight.is_floating_point() or type(base.weight) not in (nn.Parameter, Tensor)


if PeftType(_NAME) not in mapping.PEFT_TYPE_TO_CONFIG_MAPPING:
    register_peft_method(
        name=_NAME.lower(), config_cls=MosLoraConfig, model_cls=MosLoraModel, prefix="lora_"
    )
