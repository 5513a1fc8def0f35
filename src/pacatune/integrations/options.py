"""PaCA's options as other tools write them: some under their names of LoRA's, the rest as ours."""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from peft import PeftConfig

from pacatune.names import did_you_mean
from pacatune.tuner import PacaConfig

__all__ = ["join_options", "refuse_options"]

# Why options of LoRA cannot be kept.
NOT_FOR_PACA = "PaCA has no low-rank factors"
NO_DROPOUT = "PaCA has no low-rank branch whose input could be dropped"


def join_options(
    theirs: Mapping[str, Any], names: Mapping[str, str], ours: Mapping[str, Any], section: str
) -> dict[str, Any]:
    """Return options of `PacaConfig`, checked, that a tool's user has given.

    `theirs` are the tool's own, where None and what is empty is not given, and `names` what they
    are in `PacaConfig`; `ours` have its names already, in what the tool calls `section`.
    """
    if not isinstance(ours, Mapping):
        raise ValueError(f"`{section}` ({ours!r}) must be a table of PacaConfig's options.")
    own = sorted({f.name for f in fields(PacaConfig)} - {f.name for f in fields(PeftConfig)})
    for name in ours:
        if name not in own:
            raise ValueError(f"`{section}.{name}` does not exist; {did_you_mean(name, own)}")
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
    """Refuse options of a tool that are set and that PaCA would not keep, with the reasons why.

    `method` is how the tool's user has asked for PaCA.
    """
    for name, reason in reasons.items():
        if value := theirs.get(name):
            raise ValueError(f"`{name}` ({value!r}) is not for `{method}`: {reason}; drop it.")
