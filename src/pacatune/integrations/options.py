"""PaCA's options as other tools write them: some under their names of LoRA's, the rest as ours."""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from peft import PeftConfig

from pacatune.names import did_you_mean
from pacatune.tuner import PacaConfig

__all__ = ["join_options", "refuse_options"]

NOT_FOR_PACA = "PaCA has no low-rank factors"
"""Why most options of LoRA cannot be kept."""

NO_DROPOUT = "PaCA has no low-rank branch whose input could be dropped"
"""Why `lora_dropout` cannot be kept."""


def join_options(
    theirs: Mapping[str, Any], names: Mapping[str, str], ours: Mapping[str, Any], section: str
) -> dict[str, Any]:
    """Return options of `PacaConfig` that a tool's user has given, and check them.

    Args:
        theirs: The tool's own options; None, and empty lists and tables, are not given.
        names: Its name of an option -> the name in `PacaConfig`.
        ours: Options under the names of `PacaConfig`.
        section: What the tool calls `ours`, for messages.

    Raises:
        ValueError: If an option does not exist, has two values, or `PacaConfig` refuses it.
    """
    if not isinstance(ours, Mapping):
        raise ValueError(f"`{section}` ({ours!r}) must be a table of PacaConfig's options.")
    known = sorted({f.name for f in fields(PacaConfig)} - {f.name for f in fields(PeftConfig)})
    for name in ours:
        if name not in known:
            raise ValueError(f"`{section}.{name}` does not exist; {did_you_mean(name, known)}")
    options = {name: value for name, value in ours.items() if value is not None}
    for their_name, name in names.items():
        value = theirs.get(their_name)
        if value is None or value in ([], {}):
            continue
        if options.setdefault(name, value) != value:
            raise ValueError(
                f"`{their_name}` ({value!r}) and `{section}.{name}` ({options[name]!r}) differ; "
                "give one of them."
            )
    PacaConfig(**options)
    return options


def refuse_options(theirs: Mapping[str, Any], reasons: Mapping[str, str], method: str) -> None:
    """Refuse options of a tool that are set and that PaCA would not keep.

    Args:
        theirs: The tool's own options; False, 0 and what is empty are not set.
        reasons: Its name of an option -> why it cannot be kept.
        method: How the tool's user has asked for PaCA.

    Raises:
        ValueError: If one is set.
    """
    for name, reason in reasons.items():
        if value := theirs.get(name):
            raise ValueError(f"`{name}` ({value!r}) is not for `{method}`: {reason}; drop it.")
