"""What is wrong with encoded data: errors where training would be, warnings where it might be."""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

_STATISTICS = ["num_learned", "num_kept", "ends", "doubled_bos", "boundary_moved", "hidden"]


def keep_learnable(
    data: "Dataset",
    what: str,
    max_length: int | None,
    tokenizer: "PreTrainedTokenizerBase",
    warnings: list[str],
    *,
    must_end: bool = True,
) -> "Dataset":
    """Return the examples that teach something, and append what looks wrong to `warnings`.

    `what` is "training", after the name of one of several data sets, or "evaluation"; of the
    statistics only the number of tokens is kept. With `must_end`, training examples should end in a
    stop token.
    """
    refuse_unlearnable(data, tokenizer)
    kept = [index for index, num in enumerate(data["num_kept"]) if num > 0]
    if not kept:
        raise ValueError(
            f"all {len(data)} {what} examples are longer than `training.max_length` "
            f"({max_length}) before their completion begins; raise it or shorten the prompts."
        )
    if lost := _places(data, "num_kept", 0):
        warnings.append(
            f"{len(lost)} of {len(data)} {what} examples lose their whole completion at "
            f"`training.max_length` ({max_length}) and are left out: {some(lost)}."
        )
    data = data.select(kept, keep_in_memory=True)
    must_end = must_end and what.endswith("training")
    _warn(data, what, max_length, tokenizer, warnings, must_end=must_end)
    return data.remove_columns(_STATISTICS)


def refuse_unlearnable(data: Any, tokenizer: "PreTrainedTokenizerBase") -> None:
    """Refuse examples that begin twice, or of which nothing is learned, however long."""
    if doubled := _places(data, "doubled_bos", True):
        raise ValueError(
            f"{some(doubled)}: begins with {tokenizer.bos_token!r} twice, once from the data or "
            "chat template and once from the tokenizer; remove it from the data or template."
        )
    if empty := _places(data, "num_learned", 0):
        raise ValueError(
            f"{some(empty)}: nothing to learn, no token is part of a completion; remove the row, "
            "or give a `data.chat_template` whose {% generation %} marks enclose the answer."
        )


def _places(data: Any, column: str, value: object) -> list[str]:
    pairs = zip(data["place"], data[column], strict=True)
    return [place for place, found in pairs if found == value]


def find_overlap(train: "Dataset", evaluation: "Dataset", what: str = "evaluation") -> list[str]:
    """Return a warning if examples that measure are in the training data as well."""
    return overlap_warning(
        row_digests(train), row_digests(evaluation), f"{what} examples", evaluation["place"][:]
    )


def overlap_warning(
    train: Iterable[object],
    evaluation: Iterable[object],
    what: str,
    places: Sequence[str] | None = None,
) -> list[str]:
    """Return a warning if any `what`, such as test images, are in the training data as well.

    Both are given as what tells an example from others, and `places` says where each stands.
    """
    known, examples = set(train), list(evaluation)
    shared = [number for number, example in enumerate(examples) if example in known]
    if not shared:
        return []
    where = "" if places is None else f" ({some([places[number] for number in shared])})"
    return [
        f"{len(shared)} of {len(examples)} {what} are also in the training data{where}, so what is "
        "measured on them flatters; remove them from one of the two."
    ]


def row_digests(
    data: "Dataset", columns: Sequence[str] = ("input_ids", "labels")
) -> Iterator[bytes]:
    """Yield a short digest of each example: of its token ids and labels, or of other columns."""
    for row in data.with_format("numpy", columns=list(columns)):
        digest = hashlib.blake2b(digest_size=16)
        for column in columns:
            digest.update(row[column].tobytes())
        yield digest.digest()


def _warn(
    data: "Dataset",
    what: str,
    max_length: int | None,
    tokenizer: "PreTrainedTokenizerBase",
    warnings: list[str],
    *,
    must_end: bool,
) -> None:
    num_tokens = data["num_tokens"][:]
    cut = [max_length is not None and num > max_length for num in num_tokens]
    whole = [ends for ends, is_cut in zip(data["ends"], cut, strict=True) if not is_cut]
    if any(cut):
        places = [place for place, is_cut in zip(data["place"], cut, strict=True) if is_cut]
        warnings.append(
            f"{sum(cut)} of {len(data)} {what} examples are cut at `training.max_length` "
            f"({max_length}; the longest has {max(num_tokens)} tokens) and never learn to stop: "
            f"{some(places)}."
        )
    if must_end and whole and not any(whole):
        warnings.append(
            f"no {what} example ends in a stop token (the tokenizer's is "
            f"{tokenizer.eos_token!r}), so the model will not learn to end its answers; give a "
            "`data.chat_template` that ends each assistant turn with it."
        )
    fields = sorted({field for row in data["hidden"] for field in row})
    if fields:
        num_rows = sum(bool(row) for row in data["hidden"])
        warnings.append(
            f"in {num_rows} of {len(data)} {what} examples the chat template does not show the "
            f"message fields {fields}, so the model never sees them; give a `data.chat_template` "
            "that shows them, or remove them."
        )
    moved = sum(data["boundary_moved"])
    if moved:
        warnings.append(
            f"in {moved} of {len(data)} {what} examples the prompt alone is tokenized otherwise "
            "than in front of its completion, so the model is trained on a prompt that it will "
            "not see; end prompts on a token boundary, as before a space or line break."
        )


def some(places: Sequence[str]) -> str:
    """Return the first three of some places or problems, and the number of the others."""
    more = f" and {len(places) - 3} more" if len(places) > 3 else ""
    return "; ".join(places[:3]) + more
