"""Examples as rows of tokens and labels: a whole table of them, or a stream without end."""

import contextlib
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from pacatune.data.chat_images import ImageTokenizer
from pacatune.data.checks import refuse_unlearnable
from pacatune.data.encode import Encoder
from pacatune.data.formats import Example

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

_NUM_ROWS_FOR_BAR = 10_000
_OF_TRAINING = ("place", "input_ids", "labels", "num_tokens")


def encode(
    examples: list[Example],
    encoder: Encoder,
    max_length: int | None,
    num_processes: int | None,
    title: str,
) -> "Dataset":
    """Return examples as rows of tokens and labels, with what `keep_learnable` looks at."""
    from datasets import Dataset, Features

    # As JSON, since messages may have any keys and Arrow columns may not.
    table = Dataset.from_dict({"example": [json.dumps(asdict(e)) for e in examples]})
    with _progress_bars(len(examples) >= _NUM_ROWS_FOR_BAR):
        return table.map(
            lambda row: _encode_one(Example(**json.loads(row["example"])), encoder, max_length),
            remove_columns=["example"],
            features=Features(_features(with_images=isinstance(encoder.tokenizer, ImageTokenizer))),
            keep_in_memory=True,
            num_proc=num_processes if len(examples) > (num_processes or 1) else None,
            # Nothing is cached, so the costly hash of the tokenizer is not needed.
            new_fingerprint=title.replace(" ", "-"),
            desc=title,
        )


def stream(
    read: Callable[[], Iterator[Example]], encoder: Encoder, max_length: int | None
) -> "IterableDataset":
    """Return rows that are read and encoded when they are asked for, again and again.

    A row of which `max_length` leaves nothing to learn is left out; one that teaches nothing, or
    cannot be read, is an error that names it.
    """
    from datasets import Features, IterableDataset

    def rows() -> Iterator[dict[str, Any]]:
        for example in read():
            row = _encode_one(example, encoder, max_length)
            refuse_unlearnable({key: [value] for key, value in row.items()}, encoder.tokenizer)
            if row["num_kept"]:
                yield {name: row[name] for name in _OF_TRAINING}

    known = _features(with_images=False)
    features = Features({name: known[name] for name in _OF_TRAINING})
    return IterableDataset.from_generator(rows, features=features).repeat(None)


def _features(*, with_images: bool) -> dict[str, Any]:
    from datasets import List, Value

    tokens, number, flag = List(Value("int32")), Value("int64"), Value("bool")
    return {
        "place": Value("string"),
        **dict.fromkeys(("input_ids", "labels"), tokens),
        **dict.fromkeys(("num_tokens", "num_learned", "num_kept"), number),
        **dict.fromkeys(("doubled_bos", "ends", "boundary_moved"), flag),
        "hidden": List(Value("string")),
        **({"text": Value("string"), "images": List(Value("string"))} if with_images else {}),
    }


def _encode_one(example: Example, encoder: Encoder, max_length: int | None) -> dict[str, Any]:
    bos = encoder.tokenizer.bos_token_id
    takes_images, images = isinstance(encoder.tokenizer, ImageTokenizer), example.images
    if images and not takes_images:
        raise ValueError(
            f"{example.place} has images, and the data that was looked at before has none; put "
            "such rows first, or take the images out."
        )
    if takes_images and isinstance(example.completion, str):
        raise ValueError(
            f"{example.place} is a plain text, and other rows have images; make it a chat, or "
            "train on the two one after the other."
        )
    encoded = encoder(example)
    if images and max_length is not None and len(encoded.input_ids) > max_length:
        raise ValueError(
            f"{example.place} has images and {len(encoded.input_ids)} tokens, more than "
            f"`training.max_length` ({max_length}); images cannot be cut: raise it, or use smaller "
            "images."
        )
    last = max((i for i, learned in enumerate(encoded.learned) if learned), default=-1)
    return {
        "place": example.place,
        "input_ids": encoded.input_ids[:max_length],
        "labels": encoded.labels(max_length),
        "num_tokens": len(encoded.input_ids),
        # The first token is never predicted, so labelling it teaches nothing.
        "num_learned": sum(encoded.learned[1:]),
        "num_kept": sum(encoded.learned[1:max_length]),
        "doubled_bos": bos is not None and encoded.input_ids[:2] == [bos, bos],
        "ends": last >= 0 and encoded.input_ids[last] in encoder.stop_ids,
        "boundary_moved": encoded.boundary_moved,
        "hidden": encoded.hidden,
        **({"text": encoded.text, "images": images} if takes_images else {}),
    }


@contextlib.contextmanager
def _progress_bars(show: bool) -> Iterator[None]:
    import datasets

    was_shown = datasets.are_progress_bars_disabled() is False
    if not show:
        datasets.disable_progress_bars()
    try:
        yield
    finally:
        if was_shown:
            datasets.enable_progress_bars()
