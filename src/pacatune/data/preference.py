"""Answers that are preferred or not: TRL's formats, checked and encoded before weights are loaded.

A pair is an answer that is preferred (`chosen`) and one that is not (`rejected`), to one prompt. A
judged answer has a label: whether it is desirable. TRL's trainers would encode them too, but cut no
chat where a generation ends, and say of no row what is wrong with it.
"""

import random
from collections.abc import Collection, Iterable, Iterator
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from pacatune.data.config import TextDataConfig
from pacatune.data.encode import IGNORED, Encoder, common_prefix
from pacatune.data.formats import Example, check_columns, present_columns, to_answer
from pacatune.data.prepare import PreparedData, find_examples, make_tables
from pacatune.data.read import Row

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PAIR_COLUMNS = ("prompt_ids", "chosen_ids", "rejected_ids")
SCORED_COLUMNS = ("chosen_ids", "rejected_ids")
JUDGED_COLUMNS = ("prompt_ids", "completion_ids", "label")

_LABELS = {"true": True, "1": True, "false": False, "0": False}


def prepare_pairs(
    config: TextDataConfig,
    tokenizer: "PreTrainedTokenizerBase",
    *,
    max_length: int | None,
    stop_ids: Collection[int],
    num_processes: int | None = None,
    scored: bool = False,
) -> PreparedData:
    """Read, check and encode pairs.

    Returns rows of `PAIR_COLUMNS`; with `scored`, for a model that scores whole texts, rows of
    `SCORED_COLUMNS`, each with the prompt in it, and those longer than `max_length` are left out.
    """
    encoder = Encoder(
        tokenizer=tokenizer, stop_ids=stop_ids, max_length=max_length, learn_all=scored
    )
    convert = partial(to_pairs, needs_prompt=not scored)
    encode = partial(_encode_pair, encoder=encoder)
    examples = find_examples(config, convert)
    return make_tables(config, *examples, encode, max_length, num_processes, not scored)[1]


def prepare_judged(
    config: TextDataConfig,
    tokenizer: "PreTrainedTokenizerBase",
    *,
    max_length: int | None,
    stop_ids: Collection[int],
    num_processes: int | None = None,
) -> PreparedData:
    """Read, check and encode judged answers, as `prepare_pairs`; returns rows of `JUDGED_COLUMNS`.

    Those to train on are in an order that is drawn from `config.seed`, since KTO trains in that
    order.
    """
    encoder = Encoder(tokenizer=tokenizer, stop_ids=stop_ids, max_length=max_length)
    encode, examples = partial(_encode_judged, encoder=encoder), find_examples(config, to_judged)
    _, found = make_tables(config, *examples, encode, max_length, num_processes)
    train: Any = found.train
    labels = set(train["label"])
    if len(labels) == 1:
        rule = "so that nothing says which answers are better; give answers of both kinds"
        found.warnings.append(f"every training example has the label {labels.pop()}, {rule}.")
    order = list(range(len(train)))
    random.Random(config.seed).shuffle(order)
    return replace(found, train=train.select(order))


def to_pairs(
    rows: Iterable[Row], format: str = "preference", *, needs_prompt: bool
) -> Iterator[tuple[Example, Example]]:
    """Yield the preferred and the other answer of each row, checked.

    Where a row has no prompt, it is what both begin with; models that score need none.
    """
    for row in rows:
        rule = "this task needs chosen, rejected and, as a rule, prompt"
        check_columns(row, ("chosen", "rejected"), rule)
        if row.values["chosen"] == row.values["rejected"]:
            rule = "'chosen' and 'rejected' are the same, so neither is better"
            raise ValueError(f"{row.place}: {rule}; remove the row.")
        if "prompt" not in present_columns(row) and needs_prompt:
            row = _with_prompt(row)
        yield to_answer(row, "chosen"), to_answer(row, "rejected")


def to_judged(rows: Iterable[Row], format: str = "preference") -> Iterator[tuple[Example, bool]]:
    """Yield each answer with whether it is desirable; a pair is two of them."""
    needed = ("prompt", "completion", "label")
    for row in rows:
        if {"chosen", "rejected"} <= present_columns(row):
            (pair,) = to_pairs([row], needs_prompt=True)
            yield from zip(pair, (True, False), strict=True)
            continue
        check_columns(row, needed, f"this task needs {', '.join(needed)}, or chosen and rejected")
        label = _LABELS.get(str(row.values["label"]).strip().lower())
        if label is None:
            found = f"'label' is {row.values['label']!r:.80}"
            raise ValueError(f"{row.place}: {found}; it must be true (desirable) or false.")
        yield to_answer(row, "completion"), label


def _with_prompt(row: Row) -> Row:
    """Take what both answers begin with as the prompt."""
    from trl import extract_prompt

    answers = {name: row.values[name] for name in ("chosen", "rejected")}
    kinds = {type(answer) for answer in answers.values()}
    parts = extract_prompt(answers) if kinds in ({str}, {list}) and all(answers.values()) else {}
    if not all(parts.get(name) for name in ("prompt", *answers)):
        rule = "there is no 'prompt', and 'chosen' and 'rejected' are no texts that share one"
        raise ValueError(f"{row.place}: {rule}; add the column prompt.")
    return Row(row.place, {**row.values, **parts})


def _encode_pair(pair: tuple[Example, Example], *, encoder: Encoder) -> dict[str, Any]:
    """Return the tokens of the prompt and of both answers, or of both texts if all is learned."""
    chosen, rejected = map(encoder, pair)
    notes = sorted({*chosen["notes"], *rejected["notes"]})
    if encoder.learn_all and "cut" in notes:
        notes = ["lost"]
    (start, end), (other_start, other_end) = _learned_span(chosen), _learned_span(rejected)
    ids, others = chosen["input_ids"], rejected["input_ids"]
    start = min(start, other_start, common_prefix(ids[:start], others[:other_start]))
    return {
        "place": chosen["place"],
        "num_tokens": max(chosen["num_tokens"], rejected["num_tokens"]),
        "notes": ["lost"] if "lost" in notes else notes,
        "chosen_ids": ids[start:end],
        "rejected_ids": others[start:other_end],
        **({} if encoder.learn_all else {"prompt_ids": ids[:start]}),
    }


def _encode_judged(judged: tuple[Example, bool], *, encoder: Encoder) -> dict[str, Any]:
    """Return the tokens of prompt and answer, and its label."""
    row = encoder(judged[0])
    (start, end), ids = _learned_span(row), row.pop("input_ids")
    del row["labels"]
    answer = {"prompt_ids": ids[:start], "completion_ids": ids[start:end], "label": judged[1]}
    return {**row, **answer}


def _learned_span(row: dict[str, Any]) -> tuple[int, int]:
    """Return where the answer begins, and where its last learned token ends."""
    learned = [i for i, label in enumerate(row["labels"]) if label != IGNORED]
    return (learned[0], learned[-1] + 1) if learned else (0, 0)
