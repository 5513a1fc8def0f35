"""Names that people and files have: which one is meant, and which is nearest to a wrong one."""

import difflib
import re
from collections.abc import Collection, Container, Iterable
from dataclasses import fields
from typing import Any, Literal, get_args, get_origin

_MAX_LISTED = 20
_NUMBER_FORMATS = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
# What other programs call options of a trainer.
_SHORT = {
    "lr": "learning_rate",
    "epochs": "num_train_epochs",
    "batch_size": "per_device_train_batch_size",
}
# Less alike than this, a key is no guess at another one.
_NEAR = 0.6
# The name of an option, and of one in a section.
_OPTION = re.compile(r"(?<=^--)[A-Za-z][\w-]*(?:\.[\w-]+)?")


def spell(words: Iterable[str]) -> list[str]:
    """Return the words of a command, its options as the help spells them: `--max_steps`."""
    return [_OPTION.sub(lambda name: name[0].replace("-", "_"), word) for word in words]


def nearest(name: str, candidates: Iterable[str], *, cutoff: float = _NEAR) -> str | None:
    """Return the known name most like a wrong one, None where none is; capitals may be wrong too.

    With a `cutoff` of 0 there is always one.
    """
    candidates = list(candidates)
    matches = difflib.get_close_matches(name, candidates, n=1, cutoff=cutoff)
    matches = matches or difflib.get_close_matches(name.lower(), candidates, n=1, cutoff=cutoff)
    return matches[0] if matches else None


def names_of(name: str, prefix: str) -> list[str]:
    """Return the names under which a model may know a tensor of a checkpoint.

    A checkpoint of the bare model lacks the prefix (`model.`) that a model with a head has, and the
    other way round, as transformers loads both.
    """
    return [name, f"{prefix}.{name}", name.removeprefix(f"{prefix}.")] if prefix else [name]


def find_name(names: Iterable[str], candidates: Container[str]) -> str | None:
    """Return the first of several names that is known, None if none is."""
    return next((name for name in names if name in candidates), None)


def guess(name: str, candidates: Iterable[str], *, cutoff: float = _NEAR) -> str:
    """Return the question whether the nearest name is meant, and a space; nothing without one."""
    near = nearest(name, candidates, cutoff=cutoff)
    return "" if near is None else f"did you mean {near!r}? "


def did_you_mean(name: str, candidates: Collection[str]) -> str:
    """Return a sentence that names the name nearest to a wrong one, or all where none is near."""
    return guess(name, candidates).strip() or f"choose from {', '.join(candidates)}."


def full_name(name: str) -> str:
    """Return the number format that a short name means; other names as they are."""
    return _NUMBER_FORMATS.get(name, name)


def choose(name: str, candidates: Collection[str], *, option: str) -> str:
    """Return the one of several names that is meant (`-` and `_` are the same); refuse others."""
    names = {candidate.replace("-", "_"): candidate for candidate in candidates}
    wanted = full_name(str(name).replace("-", "_"))
    if wanted in names:
        return names[wanted]
    near = nearest(wanted, names)
    hint = "." if near is None else f"; did you mean {names[near]!r}?"
    raise ValueError(f"`{option}` ({name!r}) must be one of {', '.join(candidates)}{hint}")


def choices_of(annotation: Any) -> tuple[Any, ...]:
    """Return the values that an annotation such as `Literal["a", "b"] | None` names, if any."""
    kinds = (annotation, *get_args(annotation))
    return next((get_args(kind) for kind in kinds if get_origin(kind) is Literal), ())


def check_choices(config: Any, section: str = "") -> None:
    """Refuse a field of a dataclass whose value its annotation does not name; None is fine.

    What is meant replaces what is given: `bfloat16` for `bf16`, `seq-len` for `seq_len`.
    """
    for field in fields(config):
        value, choices = getattr(config, field.name), choices_of(field.type)
        if choices and value is not None:
            meant = choose(value, choices, option=f"{section}{field.name}")
            object.__setattr__(config, field.name, meant)


def suggest(key: str, candidates: Collection[str]) -> str:
    """Say which known key is nearest to `key`, in whole or in its last part, and where all are.

    A key of a section that there is stays in it, unless another one has its last part.
    """
    section, _, last = key.rpartition(".")
    last = _SHORT.get(last.lstrip("-"), last)
    inside = [name for name in candidates if section and name.startswith(f"{section}.")]
    named_so = [name for name in candidates if name.rpartition(".")[2] == last]

    def similarity(name: str) -> float:
        pairs = [(last, name.rpartition(".")[2])]
        if not inside:
            pairs.append((key, name))
        return max(difflib.SequenceMatcher(None, *pair).ratio() for pair in pairs)

    def rank(name: str) -> tuple[float, float]:
        return similarity(name), difflib.SequenceMatcher(None, key, name).ratio()

    near = max(sorted(named_so or inside or candidates), key=rank)
    keys = sorted(inside or candidates)
    all_keys = (
        f"There are {', '.join(keys)}."
        if len(keys) <= _MAX_LISTED
        else "The command's `--help` lists them all."
    )
    is_near = similarity(near) >= _NEAR
    return f"did you mean {near!r}? {all_keys}" if is_near else f"none is like it. {all_keys}"
