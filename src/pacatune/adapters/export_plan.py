"""What an export will write, whatever it is made from."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from pacatune.adapters.folder import Adapter, LoraAdapter

__all__ = ["ExportPlan", "refuse_extra"]


@dataclass(frozen=True, kw_only=True)
class ExportPlan:
    """What is to be written."""

    adapter: Adapter | LoraAdapter
    """The original."""
    base: str
    """Its base."""
    num_modules: int
    """Adapted modules."""
    config: dict[str, Any]
    """The adapter_config.json."""
    tensors: dict[str, Tensor]
    """By their names in the file."""
    rounding: float
    """Largest relative error of a factor, in the Frobenius norm."""
    notes: list[str]
    """What the user should know."""


def refuse_extra(folder: Path, names: Sequence[str], method: str, what: str = "") -> None:
    """Refuse tensors that LoRA servers do not load.

    Args:
        folder: The adapter's.
        names: Tensors that are not the method's.
        method: Its name.
        what: Where they come from, for the message.

    Raises:
        ValueError: If there are any.
    """
    if names:
        raise ValueError(
            f"{folder} also holds {len(names)} tensors that are not {method}'s, first {names[0]!r} "
            f"{what}; vLLM and most LoRA servers do not load them. Pass `keep_extra` "
            "(--keep-extra) to carry them over for PEFT, or merge the adapter instead."
        )
