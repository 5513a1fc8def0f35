"""Axolotl: `plugins: [pacatune.integrations.axolotl.PacaPlugin]` and `adapter: paca`.

docs/integrations.md has a configuration, and what of Axolotl's options is kept.
"""

import logging
from collections.abc import Callable
from functools import wraps
from typing import TYPE_CHECKING, Any

from peft import PeftModel, get_peft_model

from pacatune.integrations.options import NO_DROPOUT, NOT_FOR_PACA, join_options, refuse_options
from pacatune.tuner import PacaConfig

try:
    from axolotl.integrations.base import AdapterCapabilities, BasePlugin
    from pydantic import BaseModel, model_validator
except ModuleNotFoundError as error:
    raise ImportError(
        f"pacatune.integrations.axolotl needs Axolotl >= 0.19 ({error}): pip install axolotl"
    ) from error

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

ADAPTER = "paca"
"""Value of Axolotl's `adapter`, and name of the section with PaCA's own options."""

# Axolotl's names of options that PaCA has too.
_NAMES = {
    "lora_r": "r",
    "lora_alpha": "paca_alpha",
    "lora_target_modules": "target_modules",
    "lora_target_parameters": "target_parameters",
    "lora_exclude_modules": "exclude_modules",
    "lora_modules_to_save": "modules_to_save",
    "lora_rank_pattern": "rank_pattern",
    "lora_alpha_pattern": "alpha_pattern",
    "peft_layers_to_transform": "layers_to_transform",
    "peft_layers_pattern": "layers_pattern",
    "peft_use_rslora": "use_rslora",
    "peft_trainable_token_indices": "trainable_token_indices",
}
_LORA_KERNEL = "it is a kernel for LoRA's factors"
_REFUSED = {
    "lora_dropout": NO_DROPOUT,
    "lora_fan_in_fan_out": "PaCA sees by itself how a layer holds its weight",
    "lora_on_cpu": "PaCA adapts the model where it is",
    "lora_mlp_kernel": _LORA_KERNEL,
    "lora_qkv_kernel": _LORA_KERNEL,
    "lora_o_kernel": _LORA_KERNEL,
    "lora_embedding_kernel": _LORA_KERNEL,
    "loraplus_lr_ratio": NOT_FOR_PACA,
    "relora": "PaCA is not merged and started again during training",
    "peft": "LoftQ initialises low-rank factors",
    "peft_use_dora": NOT_FOR_PACA,
    "peft_layer_replication": "PaCA adapts the layers that there are",
    "peft_init_lora_weights": NOT_FOR_PACA,
    "peft_ensure_weight_tying": "PaCA unties what it adapts, and says so when it merges",
    "quantize_moe_experts": "it holds experts as no quantised layer that PEFT knows",
    "nvfp4_merge_aware": NOT_FOR_PACA,
    "strict": "it hides `axolotl merge-lora` from plug-ins, which would write the base unmerged",
}


class PacaArgs(BaseModel):
    """What the plug-in adds to Axolotl's configuration."""

    paca: dict[str, Any] | None = None
    """Options under the names of `PacaConfig`."""

    @model_validator(mode="before")
    @classmethod
    def _join(cls, data: dict[str, Any]) -> dict[str, Any]:
        """Put all options of the adapter into `paca`, checked, under the names of PacaConfig."""
        ours = data.get(ADAPTER) or {}
        if data.get("adapter") != ADAPTER:
            if ours:
                raise ValueError(
                    f"`paca` ({ours!r}) would be ignored by `adapter: {data.get('adapter')}`; set "
                    "`adapter: paca`, or drop `paca`."
                )
            return data
        _refuse(data)
        theirs = dict(data)
        if theirs.get("lora_target_linear"):
            if theirs.get("lora_target_modules") not in (None, [], "all-linear"):
                raise ValueError(
                    "`lora_target_linear` and `lora_target_modules` "
                    f"({theirs['lora_target_modules']!r}) both say what is adapted; give one."
                )
            theirs["lora_target_modules"] = "all-linear"
        return {**data, ADAPTER: join_options(theirs, _NAMES, ours, ADAPTER)}


def _refuse(data: dict[str, Any]) -> None:
    refuse_options(data, _REFUSED, f"adapter: {ADAPTER}")
    if (data.get("expert_parallel_size") or 1) > 1:
        raise ValueError(
            f"`expert_parallel_size` ({data['expert_parallel_size']}) is not for `adapter: paca`: "
            "Axolotl gathers LoRA's factors alone when it saves; set it to 1."
        )
    if data.get("merge_lora"):
        folder = data.get("lora_model_dir") or data.get("output_dir")
        raise ValueError(
            "`axolotl merge-lora` reads LoRA's factors alone. Merge with `pacatune merge --model "
            f"{data.get('base_model')} --adapter {folder} --output {folder}/merged`."
        )


class PacaPlugin(BasePlugin):
    """Makes `adapter: paca` known to Axolotl, with bases of 4 and 8 bits as for its LoRA."""

    def register(self, cfg: dict[str, Any]) -> None:
        """Have Axolotl quantise the base of `adapter: paca` as it does for LoRA."""
        from axolotl.loaders.model import ModelLoader

        plain = ModelLoader._set_quantization_config
        if not getattr(plain, "knows_paca", False):
            ModelLoader._set_quantization_config = _quantize_as_for_lora(plain)

    def get_input_args(self) -> str:
        """Return the name of the class that adds to the configuration."""
        return f"{__name__}.{PacaArgs.__name__}"

    def get_adapter_capabilities(self) -> list[AdapterCapabilities]:
        """Name the adapter."""
        return [AdapterCapabilities(name=ADAPTER)]

    def load_adapter(
        self,
        model: "PreTrainedModel",
        cfg: Any,
        inference: bool = False,
        config_only: bool = False,
    ) -> tuple[PeftModel | None, PacaConfig] | None:
        """Adapt a model, or load the adapter in `lora_model_dir` onto it.

        Returns:
            The adapted model and its configuration; with `config_only` this alone, and None for
            another plug-in's adapter.
        """
        if cfg.adapter != ADAPTER:
            return None
        folder = cfg.lora_model_dir
        if folder is None:
            config = PacaConfig(task_type=_task_type(model), **cfg.paca.to_dict())
            if config_only:
                return None, config
            casts = cfg.peft_autocast_adapter_dtype is not False
            peft_model = get_peft_model(model, config, autocast_adapter_dtype=casts)
        elif config_only:
            raise ValueError(
                f"`lora_model_dir` ({folder!r}) is not read with `rl: {cfg.rl.value}`, for which "
                "TRL makes the adapter; merge it with `pacatune merge`, and train the result."
            )
        else:
            logger.warning("options of the adapter come from %s, not from this file", folder)
            peft_model = PeftModel.from_pretrained(model, folder, is_trainable=not inference)
            config = peft_model.peft_config["default"]
        peft_model.print_trainable_parameters()
        return peft_model, config

    def post_trainer_create(self, cfg: Any, trainer: Any) -> None:
        """Keep deltas in float32: TRL holds adapters on quantised models in bfloat16."""
        if cfg.adapter == ADAPTER and (cfg.load_in_4bit or cfg.load_in_8bit):
            for parameter in trainer.model.parameters():
                if parameter.requires_grad:
                    parameter.data = parameter.data.float()


def _task_type(model: "PreTrainedModel") -> str:
    name = type(model).__name__
    kinds = {"SequenceClassification": "SEQ_CLS", "TokenClassification": "TOKEN_CLS"}
    return next((kind for part, kind in kinds.items() if part in name), "CAUSAL_LM")


def _quantize_as_for_lora(plain: Callable[[Any], None]) -> Callable[[Any], None]:
    """Return Axolotl's way to say how a base is quantised, which otherwise knows LoRA alone."""

    @wraps(plain)
    def set_quantization_config(loader: Any) -> None:
        cfg = loader.cfg
        if cfg.adapter != ADAPTER:
            plain(loader)
            return
        cfg.adapter = "qlora" if cfg.load_in_4bit else "lora"
        try:
            plain(loader)
        finally:
            cfg.adapter = ADAPTER

    vars(set_quantization_config)["knows_paca"] = True
    return set_quantization_config
