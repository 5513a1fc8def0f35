"""Answers that are preferred or not: TRL's formats, checked and encoded before weights are loaded.

A pair is an answer that is preferred (`chosen`) and one that is not (`rejected`), to one prompt. A
judged answer has a label: whether it is desirable. TRL's trainers would encode them too, but cut no
chat where a generation ends, and say of no row what is wrong with it.
"""

import random
from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

from pacatune.data.config import DataSection
from pacatune.data.encode import IGNORED, Encoder, common_prefix
from pacatune.data.formats import Example, check_columns, present_columns, to_answer
from pacatune.data.prepare import PreparedData, make_tables
from pacatune.data.read import Row, named

_LABELS = {"true": True, "1": True, "false": False, "0": False}


def prepare_pairs(
    config: DataSection, encoder: Encoder, num_processes: int | None = None
) -> PreparedData:
    """Read, check and encode pairs: rows of `prompt_ids`, `chosen_ids` and `rejected_ids`.

    Where all is learned, for models that score, the prompt is in both, and nothing is cut.
    """
    convert = partial(to_pairs, needs_prompt=not encoder.learn_all)
    encode = partial(_encode_pair, encoder=encoder)
    return make_tables(config, encode, convert, encoder.max_length, num_processes)[1]


def prepare_judged(
    config: DataSection, encoder: Encoder, num_processes: int | None = None
) -> PreparedData:
    """Read, check and encode answers: rows of `prompt_ids`, `completion_ids` and `label`."""
    encode = partial(_encode_judged, encoder=encoder)
    _, data = make_tables(config, encode, to_judged, encoder.max_length, num_processes)
    order = list(range(len(data.train)))  # KTO trains in the order of the data
    random.Random(config.seed).shuffle(order)
    return replace(data, train=data.train.select(order))


def to_pairs(
    rows: Iterable[Row], format: str = "", *, needs_prompt: bool = False
) -> Iterator[tuple[Example, Example]]:
    """Yield the preferred and the other answer of each row; a prompt is what both begin with."""
    for place, values in ((row.place, row.values) for row in rows):
        with named(place):
            check_columns(values, "chosen", "rejected")
            if values["chosen"] == values["rejected"]:
                rule = "'chosen' and 'rejected' are the same, so neither is better"
                raise ValueError(f"{rule}; remove the row.")
            if "prompt" not in present_columns(values) and needs_prompt:
                values = _with_prompt(values)
            yield to_answer(place, values, "chosen"), to_answer(place, values, "rejected")


def to_judged(rows: Iterable[Row], format: str = "") -> Iterator[tuple[Example, bool]]:
    """Yield each answer with whether it is desirable; a pair is two of them."""
    for row in rows:
        if {"chosen", "rejected"} <= present_columns(row.values):
            (pair,) = to_pairs([row], needs_prompt=True)
            yield from zip(pair, (True, False), strict=True)
            continue
        with named(row.place):
            check_columns(row.values, "prompt", "completion", "label")
            label = _LABELS.get(str(row.values["label"]).strip().lower())
            if label is None:
                rule = f"'label' is {row.values['label']!r:.80}"
                raise ValueError(f"{rule}; it must be true (desirable) or false.")
            yield to_answer(row.place, row.values, "completion"), label


def _with_prompt(values: dict[str, Any]) -> dict[str, Any]:
    """Take what both answers begin with as the prompt."""
    from trl import extract_prompt

    answers = {name: values[name] for name in ("chosen", "rejected")}
    kinds = {type(answer) for answer in answers.values()}
    parts = extract_prompt(answers) if kinds in ({str}, {list}) and all(answers.values()) else {}
    if not parts or not all(parts.values()):
        rule = "there is no 'prompt', and 'chosen' and 'rejected' are no texts that share one"
        raise ValueError(f"{rule}; add the column prompt.")
    return {**values, **parts}


def _encode_pair(pair: tuple[Example, Example], *, encoder: Encoder) -> dict[str, Any]:
    """Return the tokens of the prompt and of both answers, or of both texts if all is learned."""
    chosen, rejected = map(encoder, pair)
    notes = {*chosen["notes"], *rejected["notes"]}
    if encoder.learn_all or "lost" in notes:
        notes = notes & {"unread"} | ({"lost"} if {"lost", "cut"} & notes else set())
    (start, end), (other_start, other_end) = _learned_span(chosen), _learned_span(rejected)
    ids, others = chosen["input_ids"], rejected["input_ids"]
    start = min(start, other_start, common_prefix(ids[:start], others[:other_start]))
    return {
        "place": chosen["place"],
        "num_tokens": max(chosen["num_tokens"], rejected["num_tokens"]),
        "notes": sorted(notes),
        "chosen_ids": ids[start:end],
        "rejected_ids": others[start:other_end],
        **({} if encoder.learn_all else {"prompt_ids": ids[:start]}),
    }


def _encode_judged(judged: tuple[Example, bool], *, encoder: Encoder) -> dict[str, Any]:
    """Return the tokens of prompt and answer, and its label."""
    row = encoder(judged[0])
    (start, end), ids = _learned_span(row), row.pop("input_ids")
    del row["labels"]
    return {**row, "prompt_ids": ids[:start], "completion_ids": ids[start:end], "label": judged[1]}


def _learned_span(row: dict[str, Any]) -> tuple[int, int]:
    """Return where the answer begins, and where its last learned token ends."""
    learned = [i for i, label in enumerate(row["labels"]) if label != IGNORED]
    return (learned[0], learned[-1] + 1) if learned else (0, 0)
