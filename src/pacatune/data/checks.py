"""What is wrong with encoded data: warnings where training might be other than it is meant."""

import hashlib
import struct
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

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
    for note, noted in places.items():
        if noted:
            warnings.append(note_on(note, noted, f"{len(data)} {what} examples", max_length))
    return data.select(kept).remove_columns("notes")


def note_on(note: str, places: Sequence[str], of: str, max_length: int | None = None) -> str:
    """Return a note about the examples at some places, out of so many."""
    return f"{len(places)} of {of} {_NOTES[note].format(max_length=max_length)}: {some(places)}."


def find_overlap(train: "Dataset", evaluation: "Dataset") -> list[str]:
    """Return a warning if examples that measure are in the training data as well."""
    columns = [name for name in train.column_names if name.endswith(("_ids", "label", "labels"))]
    trained, asked = (row_digests(data, columns) for data in (train, evaluation))
    return overlap_warning(trained, asked, "evaluation examples", evaluation["place"][:])


def overlap_warning(
    train: Iterable[object],
    evaluation: Iterable[object],
    what: str,
    places: Sequence[str] | None = None,
) -> list[str]:
    """Return a warning if any `what`, such as test images, are in the training data as well."""
    trained, examples = set(train), list(evaluation)
    shared = [number for number, example in enumerate(examples) if example in trained]
    if not shared:
        return []
    where = "" if places is None else f" ({some([places[number] for number in shared])})"
    return [
        f"{len(shared)} of {len(examples)} {what} are also in the training data{where}, so what is "
        "measured on them flatters; remove them from one of the two."
    ]


def fingerprint(parts: Iterable["Dataset"], columns: Sequence[str]) -> str:
    """Return a digest of the rows of some data sets, by which a resumed run knows them again."""
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(b"".join(row_digests(part, columns)))
    return digest.hexdigest()


def row_digests(data: "Dataset", columns: Sequence[str]) -> Iterator[bytes]:
    """Yield a short digest of some columns of each example."""
    for table in data.with_format("arrow", columns=list(columns)).iter(1000):
        # A column is read as a whole: row by row takes twenty times as long.
        values = [_pieces(table[column].combine_chunks()) for column in columns]
        for pieces in zip(*values, strict=True):
            borders = struct.pack(f"<{len(pieces)}q", *map(len, pieces))
            yield hashlib.blake2b(borders + b"".join(pieces), digest_size=16).digest()


def _pieces(array: Any) -> list[bytes]:
    """Return the bytes of each value of an Arrow array: a text, a list of numbers, or a number."""
    kind = str(array.type).removeprefix("large_")
    if kind == "string":
        return [text.encode(errors="surrogatepass") for text in array.to_pylist()]
    if kind == "bool":
        array = array.cast("int8")
    ends, numbers = range(len(array) + 1), array
    if kind.startswith("list"):
        offsets, numbers = array.offsets.to_numpy(), array.flatten()
        ends = (offsets - offsets[0]).tolist()
    values = numbers.to_numpy(zero_copy_only=False)
    whole, size = values.tobytes(), values.itemsize
    return [whole[size * start : size * end] for start, end in pairwise(ends)]


def some(places: Sequence[str]) -> str:
    """Return the first three of some places or problems, and the number of the others."""
    more = f" and {len(places) - 3} more" if len(places) > 3 else ""
    return "; ".join(places[:3]) + more
