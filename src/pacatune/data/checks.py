"""What is wrong with encoded data: warnings where training might be other than it is meant."""

import hashlib
import struct
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from datasets import Dataset

_NOTES = {
    "lost": "do not fit into `training.max_length` ({max_length}) and are left out",
    "cut": "are cut at `training.max_length` ({max_length}) and never learn to stop",
    "open": "do not end in a stop token, so the model will not learn to end its answers; give a "
    "`data.chat_template` that ends each assistant turn with it",
    "moved": "have a prompt that is tokenized otherwise alone than in front of its completion, so "
    "the model is trained on a prompt that it will not see; end prompts on a token boundary, as "
    "before a space or line break",
    "plain": "are texts that are trained without the chat template, which `generate` uses; make "
    "them chats, or generate with --no_chat",
    "unread": "set `chat_template_kwargs` that the chat template does not read, so they change "
    "nothing",
}
"""What the notes of an encoded example say."""


def keep_learnable(
    data: "Dataset", what: str, max_length: int | None, warnings: list[str]
) -> "Dataset":
    """Return the examples that teach something, and append what looks wrong to `warnings`."""
    places, kept = defaultdict(list), []
    for number, (place, notes) in enumerate(zip(data["place"][:], data["notes"][:], strict=True)):
        for note in notes:
            places[note].append(place)
        kept += [] if "lost" in notes else [number]
    if not kept:
        raise ValueError(
            f"all {len(data)} {what} examples are longer than `training.max_length` "
            f"({max_length}) before their completion begins; raise it or shorten the prompts."
        )
    if what == "evaluation" or len(places["open"]) < len(kept) - len(places["cut"]):
        places["open"] = []  # where some end, the others may be meant so
    if what == "evaluation":
        places["plain"] = []  # said of the training examples
    warnings += [
        f"{len(noted)} of {len(data)} {what} examples "
        f"{_NOTES[note].format(max_length=max_length)}: {some(noted)}."
        for note, noted in places.items()
        if noted
    ]
    return data.select(kept).remove_columns("notes")


def overlap_warning(train: "Dataset", evaluation: "Dataset", columns: Sequence[str]) -> list[str]:
    """Return a warning if examples that measure are in the training data as well."""
    trained, numbers = {*row_digests(train, columns)}, range(1, len(evaluation) + 1)
    has_places, texts = "place" in evaluation.column_names, evaluation.with_format(None)
    places = texts["place"][:] if has_places else [f"example {number}" for number in numbers]
    rows = zip(places, row_digests(evaluation, columns), strict=True)
    shared = [place for place, row in rows if row in trained]
    if not shared:
        return []
    return [
        f"{len(shared)} of {len(evaluation)} evaluation examples are also in the training data "
        f"({some(shared)}), so what is measured on them flatters; remove them from one of the two."
    ]


def fingerprint(parts: Iterable["Dataset"], columns: Sequence[str]) -> str:
    """Return a digest of the rows of some data sets, by which a resumed run knows them again."""
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(b"".join(row_digests(part, columns)))
    return digest.hexdigest()


def row_digests(data: "Dataset", columns: Sequence[str]) -> Iterator[bytes]:
    """Yield a short digest of some columns of each example: texts, numbers, or lists of them."""
    import numpy as np

    for frame in data.with_format("pandas", columns=list(columns)).iter(1000):
        for values in zip(*(frame[column] for column in columns), strict=True):
            pieces = [
                v.encode(errors="surrogatepass") if isinstance(v, str) else np.asarray(v).tobytes()
                for v in values
            ]
            borders = struct.pack(f"<{len(pieces)}q", *map(len, pieces))
            yield hashlib.blake2b(borders + b"".join(pieces), digest_size=16).digest()


def some(places: Sequence[str]) -> str:
    """Return the first three of some places or problems, and the number of the others."""
    more = f" and {len(places) - 3} more" if len(places) > 3 else ""
    return "; ".join(places[:3]) + more
