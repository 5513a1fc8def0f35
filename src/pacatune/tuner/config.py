"""The configuration of a PaCA adapter, written to and read from adapter_config.json."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftConfig
from peft.utils import PeftType
from peft.utils.other import get_pattern_key

from pacatune.format.options import IN_TENSORS, NEEDS_US, PacaOptions, idle_layers


@dataclass
class PacaConfig(PacaOptions, PeftConfig):
    """Configure Partial Connection Adaptation: `r` columns of each target weight are trained.

    Effective columns: W[:, indices] + paca_alpha / r * delta. The keys up to `modules_to_save` are
    those of PEFT 0.22's own PaCA; the others are ours, and a reader that does not know them
    ignores them.

    Raises:
        ValueError: If a value is out of its range or contradicts another one.

    Source: PaCA, Sec. 3.1; `paca_alpha` is the alpha of Tables 9-11.
    """

    def __new__(cls, *args: Any, **kwargs: Any) -> "PacaConfig":
        """Say the name of what LoRA calls otherwise; Python would only not know it."""
        if "lora_alpha" in kwargs:
            raise TypeError(
                f"{cls.__name__} got an unexpected keyword argument 'lora_alpha' "
                f"({kwargs['lora_alpha']!r}); it is `paca_alpha` here."
            )
        return super().__new__(cls)

    def __post_init__(self) -> None:
        """Check every value that can be checked without the model."""
        PacaOptions.__post_init__(self)
        PeftConfig.__post_init__(self)
        self.peft_type = PeftType.PACA
        for name in ("target_modules", "exclude_modules"):
            if isinstance(getattr(self, name), list):
                setattr(self, name, set(getattr(self, name)))

    def to_dict(self) -> dict[str, Any]:
        """Return what adapter_config.json holds: `peft_type` says whether PEFT's PaCA reads it."""
        values: dict[str, Any] = super().to_dict()
        if self.needs_pacatune():
            values["peft_type"] = NEEDS_US
        return values

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Write adapter_config.json, which leaves the columns to the file of tensors beside it."""
        saved = copy.copy(self)
        if self.columns is not None:
            saved.columns = IN_TENSORS
        super(PacaConfig, saved).save_pretrained(save_directory, **kwargs)


def seeded(config: PacaConfig) -> PacaConfig:
    """Return a configuration with a seed, a copy with one of torch's generator if it has none."""
    if config.random_seed is None:
        config = copy.copy(config)
        config.random_seed = int(torch.randint(2**63 - 1, (), device="cpu"))
    return config


def refuse_idle_layers(config: PeftConfig) -> None:
    """Refuse to make an adapter that leaves an option out; a finished one has it in its file."""
    if idle := idle_layers(config):
        raise ValueError(
            f"{idle} cannot be used when `target_modules` is a regular expression "
            f"({vars(config)['target_modules']!r}): give `target_modules` as a list of names, or "
            "put the layers into the expression."
        )


def key_of_columns(columns: Mapping[str, list[Any]], name: str) -> str | None:
    """Return the name or pattern by which a configuration gives a module's columns, or None."""
    if name in columns:  # first: patterns of many modules would be compiled for each of them
        return name
    key = str(get_pattern_key(columns.keys(), name))
    return key if key in columns else None
