"""LoRA and its kin, of one set of options."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from peft import LoraConfig

    from pacatune.training.config import MosLoraSection


def make_lora_config(
    method: str, options: Mapping[str, Any], moslora: "MosLoraSection"
) -> "LoraConfig":
    """Return the configuration of `lora`, `qlora`, `dora` or `moslora`.

    Args:
        method: Of the run.
        options: Of PEFT's LoraConfig, for each of them.
        moslora: More options, for `moslora`.
    """
    if method == "moslora":
        from pacatune import MosLoraConfig

        return MosLoraConfig(**options, **asdict(moslora))
    from peft import LoraConfig

    return LoraConfig(use_dora=method == "dora", **options)
