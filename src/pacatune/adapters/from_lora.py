"""Turn a LoRA adapter into one of PaCA over all columns: the same update, trained in place.

A (R, I) is the mix of all I columns, B (O, R) is delta. Loaded as trainable
(`PeftModel.from_pretrained(base, folder, is_trainable=True)`), training goes on in the weights;
`export_lora` makes it a LoRA again, whose factors are these.
"""

import math
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pacatune.adapters.folder import LoraAdapter, find_tensors, open_adapter
from pacatune.files.folder import check_output, staged_folder
from pacatune.files.tensor_file import read_tensors, write_tensors
from pacatune.format.tensors import DELTA, INDICES, MIX, TENSORS_NAME
from pacatune.tuner.config import PacaConfig

_SAME = (
    *("task_type", "auto_mapping", "base_model_name_or_path", "revision", "r", "rank_pattern"),
    *("alpha_pattern", "target_modules", "exclude_modules", "layers_to_transform"),
    *("layers_pattern", "modules_to_save"),
)
# Of LoRA alone, and without a meaning for what has been trained.
_READ = ("lora_alpha", "use_rslora", "bias", "peft_type", "peft_version", "inference_mode")
_IDLE = ("lora_dropout", "fan_in_fan_out", "init_lora_weights", "runtime_config")
# They change the base, or are made from it.
_OF_OTHER_BASES = ("pissa", "olora", "corda", "loftq", "lora_ga")


def adapter_from_lora(adapter: str | Path, output: str | Path) -> int:
    """Write a LoRA adapter as one of PaCA that trains all columns, with the same factors.

    Args:
        adapter: Folder or hub id of a LoRA of linear layers.
        output: Folder to write, missing or empty.

    Returns:
        The number of its modules.

    Raises:
        FileNotFoundError: If the adapter is missing.
        FileExistsError: If `output` is in use.
        ValueError: If it is damaged, no LoRA, or one that adds more than B A to linear layers.
    """
    output = Path(output)
    check_output(output, num_bytes=0)
    opened = open_adapter(adapter)
    if not isinstance(opened, LoraAdapter) or opened.config.peft_type != "LORA":
        raise ValueError(f"{opened.folder} is no LoRA adapter; only these become PaCA's.")
    config = _converted(opened)
    tensors, num_modules = _renamed(read_tensors(find_tensors(opened.folder)), opened.folder)
    with staged_folder(output, sum(tensor.nbytes for tensor in tensors.values())) as staging:
        config.save_pretrained(str(staging))
        write_tensors(tensors, staging / TENSORS_NAME)
    return num_modules


def _converted(opened: LoraAdapter) -> PacaConfig:
    config: Any = opened.config
    usual = type(config)()
    known = {*_SAME, *_READ, *_IDLE}
    for option in (field.name for field in fields(config)):
        value = getattr(config, option)
        if option not in known and value and value != getattr(usual, option):
            raise ValueError(
                f"{opened.folder} has `{option}` = {value!r}, so it is more than B A beside linear "
                "layers; train it as a LoRA, or merge it."
            )
    if str(config.init_lora_weights).lower().startswith(_OF_OTHER_BASES):
        raise ValueError(
            f"{opened.folder} has `init_lora_weights` = {config.init_lora_weights!r}, which "
            "changes the base; convert it by PEFT to a plain LoRA first (`save_pretrained` with "
            "`path_initial_model_for_weight_conversion`)."
        )
    values = {name: getattr(config, name) for name in _SAME}
    alpha = config.lora_alpha
    if config.use_rslora:
        if config.rank_pattern or config.alpha_pattern:
            raise ValueError(
                f"{opened.folder} has `use_rslora` and patterns of ranks or alphas; merge it, or "
                "say their scales as alpha / r."
            )
        alpha *= math.sqrt(config.r)
    bias: Any = "paca_only" if config.bias == "lora_only" else config.bias
    return PacaConfig(channels=1.0, paca_alpha=alpha, bias=bias, **values)


def _renamed(tensors: dict[str, Tensor], folder: Path) -> tuple[dict[str, Tensor], int]:
    """Return the tensors of PaCA's file, and the number of modules."""
    renamed, num_modules = dict[str, Tensor](), 0
    for name, tensor in tensors.items():
        module, _, kind = name.rpartition(".lora_")
        if kind not in ("A.weight", "B.weight"):
            if module:
                raise ValueError(
                    f"{folder} holds {name!r}, so it is more than B A beside linear layers."
                )
            renamed[name] = tensor  # heads, biases
            continue
        if tensor.ndim != 2:
            raise ValueError(
                f"{folder}: {name!r} has shape {tuple(tensor.shape)}; only LoRA of linear layers "
                "becomes PaCA's."
            )
        renamed[f"{module}.{MIX if kind[0] == 'A' else DELTA}"] = tensor
        if kind[0] == "A":
            num_modules += 1
            renamed[f"{module}.{INDICES}"] = torch.arange(tensor.shape[1], device="cpu")
    return renamed, num_modules
