"""MosLoRA: LoRA with a trained r x r mixer between its two factors. A baseline of the paper.

    y = x W^T + s dropout(x) A^T M^T B^T        A (R, I), M (R, R), B (O, R); s = lora_alpha / r

B starts at zero, so an untrained adapter changes nothing. Everything but the mixer is PEFT's LoRA,
whose layers take it as a variant. The adapter has a `peft_type` of its own: as LORA, PEFT would
leave the mixer out and say nothing.

Source: T. Wu et al., Mixture-of-Subspaces in Low-Rank Adaptation, arXiv 2406.11909.
"""

import math
from dataclasses import dataclass
from typing import Any, cast

from peft import mapping
from peft.tuners.lora import LoraConfig, LoraModel
from peft.tuners.lora.layer import Linear as LoraLinear
from peft.tuners.lora.layer import LoraLayer, LoraVariant
from peft.utils.peft_types import PeftType, register_peft_method
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from pacatune.methods import METHODS, Method
from pacatune.tuner.registration import ensure_peft_type

_NAME = "MOSLORA"
ensure_peft_type(_NAME)


@dataclass
class MosLoraConfig(LoraConfig):
    """Configure MosLoRA: the options of PEFT's LoraConfig."""

    def __post_init__(self) -> None:
        """Say whose adapter it is."""
        super().__post_init__()
        self.peft_type = PeftType(_NAME)


class MosLoraVariant(LoraVariant):
    """What PEFT's layers ask a variant of LoRA to do."""

    @staticmethod
    def init(module: Any, adapter_name: str, config: MosLoraConfig, **kwargs: Any) -> None:
        """Give an adapter its mixer, which starts as A does; the authors' code runs that."""
        rank = module.r[adapter_name]
        mixer = nn.Linear(rank, rank, bias=False)
        if not mixer.weight.is_meta:
            nn.init.kaiming_uniform_(mixer.weight, a=math.sqrt(5))
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


class Linear(LoraLinear):
    """An nn.Linear or Conv1D (transformers) with MosLoRA adapters.

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


class MosLoraModel(LoraModel):
    """PEFT's LoRA tuner with layers that have mixers."""

    @staticmethod
    def _create_new_module(
        lora_config: MosLoraConfig, adapter_name: str, target: Any, **kwargs: Any
    ) -> nn.Module:
        if not isinstance(target, nn.Linear | Conv1D) or not target.weight.is_floating_point():
            raise TypeError(
                f"Target module {kwargs['target_name']!r} ({type(target).__name__}) is not "
                "supported. MosLoRA adapts torch.nn.Linear and transformers' Conv1D."
            )
        is_conv1d = isinstance(target, Conv1D)
        layer = Linear(
            target, adapter_name, config=lora_config, is_target_conv_1d_layer=is_conv1d, **kwargs
        )
        layer.fan_in_fan_out = is_conv1d
        return cast(nn.Module, layer)


if PeftType(_NAME) not in mapping.PEFT_TYPE_TO_CONFIG_MAPPING:
    register_peft_method(
        name=_NAME.lower(), config_cls=MosLoraConfig, model_cls=MosLoraModel, prefix="lora_"
    )


def add_method() -> None:
    """Add the row `moslora` to the methods that `train`, `estimate` and the measurements know."""
    METHODS["moslora"] = Method(
        name="moslora",
        title="MosLoRA",
        summary="LoRA with a trained mixer between its factors",
        sections=("lora",),
        config=MosLoraConfig,
        text_rate=2e-4,
        head_rate=1e-3,
    )
