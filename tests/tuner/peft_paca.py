"""A stand-in for the PaCA that PEFT 0.22 ships, with what it takes, ignores, writes and computes.

Fields, defaults and checks of the configuration, the rule of the columns, names in files and the
kinds of layers are those of PEFT's source at 9732f360; the words are ours. Nothing
of pacatune is imported.
"""

import sys
import types
import zlib
from dataclasses import dataclass
from typing import Any

import peft
import torch
from peft import PeftConfig
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, _get_in_out_features
from peft.utils import PeftType
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from peft.utils.peft_types import register_peft_method
from torch import nn
from torch.nn import functional as F


@dataclass
class PacaConfig(PeftConfig):
    r: int = 8
    paca_alpha: int = 8
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    random_seed: int | None = None
    init_weights: bool = True
    modules_to_save: list[str] | None = None

    def __post_init__(self):
        super().__post_init__()
        self.peft_type = PeftType.PACA
        for name in ("target_modules", "exclude_modules"):
            if isinstance(getattr(self, name), list):
                setattr(self, name, set(getattr(self, name)))


class PacaLayer(BaseTunerLayer):
    adapter_layer_names = ("paca_delta",)
    other_param_names = ("r", "paca_alpha", "scaling", "paca_indices")


class Linear(nn.Module, PacaLayer):
    def __init__(self, base_layer, adapter_name, **options):
        super().__init__()
        self.base_layer = base_layer
        self.r, self.paca_alpha, self.scaling = {}, {}, {}
        self.paca_delta = nn.ParameterDict({})
        self.paca_indices = BufferDict({}, persistent=True)
        self._disable_adapters = False
        self.merged_adapters = []
        self.in_features, self.out_features = _get_in_out_features(base_layer)
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, **options)

    def update_layer(self, adapter_name, r, paca_alpha, init_weights, random_seed):
        self.r[adapter_name], self.paca_alpha[adapter_name] = r, paca_alpha
        self.scaling[adapter_name] = paca_alpha / r
        generator = None
        if random_seed is not None:
            generator = torch.Generator().manual_seed(random_seed)
        columns = torch.randperm(self.in_features, generator=generator)[:r]
        self.paca_indices[adapter_name] = columns.sort().values
        delta = torch.zeros(self.out_features, r)
        self.paca_delta[adapter_name] = nn.Parameter(
            delta if init_weights else delta.normal_(0, 0.1)
        )
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters)

    def _adapted(self, weight, name):
        columns = self.paca_indices[name]
        update = self.scaling[name] * self.paca_delta[name]
        return weight.index_copy(1, columns, (weight[:, columns] + update).to(weight.dtype))

    def forward(self, x, *args: Any, **kwargs: Any):
        if self.disable_adapters:
            return self.base_layer(x, *args, **kwargs)
        weight = self.base_layer.weight
        for name in self.active_adapters:
            if name in self.paca_delta:
                weight = self._adapted(weight, name)
        return F.linear(x, weight, self.base_layer.bias)


class PacaModel(BaseTuner):
    prefix = "paca_"
    tuner_layer_cls = PacaLayer
    target_module_mapping = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.copy()

    def _create_and_replace(
        self, config, adapter_name, target, target_name, parent, current_key, **kwargs
    ):
        seed = config.random_seed
        if seed is not None:
            seed = (seed + zlib.crc32(current_key.encode())) % 2**63
        options = {"r": config.r, "paca_alpha": config.paca_alpha, "random_seed": seed}
        options["init_weights"] = config.init_weights
        if isinstance(target, PacaLayer):
            target.update_layer(adapter_name, **options)
            return
        if not isinstance(target, nn.Linear):
            raise TypeError(f"Target module {target} is not supported, only `torch.nn.Linear` is.")
        layer = Linear(target, adapter_name, **options)
        if adapter_name not in self.active_adapter:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)


def install():
    """Make PEFT look like 0.22: its enum's member, its registry and its names."""
    member = str.__new__(PeftType, "PACA")
    member._name_ = member._value_ = "PACA"
    PeftType._member_names_.append("PACA")
    PeftType._member_map_["PACA"] = PeftType._value2member_map_["PACA"] = member
    type.__setattr__(PeftType, "PACA", member)
    register_peft_method(name="paca", config_cls=PacaConfig, model_cls=PacaModel, prefix="paca_")
    names = {"PacaConfig": PacaConfig, "PacaModel": PacaModel, "Linear": Linear}
    for name in ("peft", "peft.tuners", "peft.tuners.paca"):
        module = sys.modules.setdefault(name, types.ModuleType(name))
        vars(module).update({k: v for k, v in names.items() if k != "Linear" or "paca" in name})
    peft.tuners.paca = sys.modules["peft.tuners.paca"]
