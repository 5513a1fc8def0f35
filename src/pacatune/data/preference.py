"""Answers that are preferred or not: TRL's formats, checked and encoded before weights are loaded.

A pair is an answer that is preferred (`chosen`) and one that is not (`rejected`), to one prompt. A
judged answer has a label: whether it is desirable.
"""

import random
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from pacatune.data.checks import keep_learnable, overlap_warning, row_digests, some
from pacatune.data.config import TextDataConfig
from pacatune.data.encode import IGNORED, Encoder, common_prefix
from pacatune.data.formats import Example, check_unused, present_columns, to_answer
from pacatune.data.prepare import PreparedData, check_template, split_places
from pacatune.data.read import Row, read_rows
from pacatune.data.rows import encode

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

T = TypeVar("T")

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
    encoder = Encoder(tokenizer, stop_ids, learn_all=scored)
    warnings: list[str] = []

    def make(pairs: list[tuple[Example, Example]], what: str) -> tuple["Dataset", int]:
        examples = [example for pair in pairs for example in pair]
        data = encode(examples, encoder, max_length, num_processes, f"Tokenizing {what} data")
        too_long = _too_long(data) if scored else _without_completion(data)
        data = _leave_out_pairs(data, too_long, what, max_length, warnings)
        data = keep_learnable(data, what, max_length, tokenizer, warnings, must_end=not scored)
        rows = [_join_pair(data[i], data[i + 1], scored) for i in range(0, len(data), 2)]
        return _dataset(rows, SCORED_COLUMNS if scored else PAIR_COLUMNS), max(data["num_tokens"])

    def read(rows: Iterable[Row]) -> Iterator[tuple[Example, Example]]:
        return to_pairs(rows, needs_prompt=not scored)

    columns = SCORED_COLUMNS if scored else PAIR_COLUMNS
    return _prepare(config, tokenizer, read, make, columns, max_length, warnings)


def prepare_judged(
    config: TextDataConfig,
    tokenizer: "PreTrainedTokenizerBase",
    *,
    max_length: int | None,
    stop_ids: Collection[int],
    num_processes: int | None = None,
) -> PreparedData:
    """Read, check and encode judged answers; returns rows of `JUDGED_COLUMNS`.

    Those to train on are in an order that is drawn from `config.seed`, since KTO trains in that
    order.
    """
    encoder = Encoder(tokenizer, stop_ids)
    warnings: list[str] = []

    def make(judged: list[tuple[Example, bool]], what: str) -> tuple["Dataset", int]:
        if what == "training":
            random.Random(config.seed).shuffle(judged)
        examples = [example for example, _ in judged]
        data = encode(examples, encoder, max_length, num_processes, f"Tokenizing {what} data")
        data = data.add_column("label", [label for _, label in judged])
        data = keep_learnable(data, what, max_length, tokenizer, warnings)
        rows = []
        for row in data:
            start, end = _learned_span(row)
            ids = row["input_ids"]
            rows.append(
                {
                    "place": row["place"],
                    "prompt_ids": ids[:start],
                    "completion_ids": ids[start:end],
                    "label": row["label"],
                }
            )
        return _dataset(rows, JUDGED_COLUMNS), max(data["num_tokens"])

    prepared = _prepare(config, tokenizer, to_judged, make, JUDGED_COLUMNS, max_length, warnings)
    labels = set(prepared.train["label"])
    if len(labels) == 1:
        warnings.append(
            f"every training example has the label {labels.pop()}, so that nothing says which "
            "answers are better; give answers of both kinds."
        )
    return prepared


def to_pairs(rows: Iterable[Row], *, needs_prompt: bool) -> Iterator[tuple[Example, Example]]:
    """Yield the preferred and the other answer of each row, checked.

    Where a row has no prompt, it is what both begin with; models that score need none.
    """
    for row in rows:
        _check_columns(row, ("chosen", "rejected"), "chosen, rejected and, as a rule, prompt")
        check_unused(row, "preference")
        chosen, rejected = row.values["chosen"], row.values["rejected"]
        if chosen == rejected:
            raise ValueError(
                f"{row.place}: 'chosen' and 'rejected' are the same, so neither is better; remove "
                "the row."
            )
        if "prompt" not in present_columns(row) and needs_prompt:
            row = _with_prompt(row)
        yield to_answer(row, "chosen"), to_answer(row, "rejected")


def to_judged(rows: Iterable[Row]) -> Iterator[tuple[Example, bool]]:
    """Yield each answer with whether it is desirable; a pair is two of them."""
    for row in rows:
        if {"chosen", "rejected"} <= present_columns(row):
            (pair,) = to_pairs([row], needs_prompt=True)
            yield from zip(pair, (True, False), strict=True)
            continue
        needed = ("prompt", "completion", "label")
        _check_columns(row, needed, f"{', '.join(needed)}, or chosen and rejected")
        check_unused(row, "preference")
        yield to_answer(row, "completion"), _label(row)


def _label(row: Row) -> bool:
    value = row.values["label"]
    found = value if isinstance(value, bool) else _LABELS.get(str(value).strip().lower())
    if found is None:
        raise ValueError(
            f"{row.place}: 'label' is {value!r:.80}; it must be true (desirable) or false."
        )
    return found


def _check_columns(row: Row, needed: Sequence[str], rule: str) -> None:
    present = present_columns(row)
    missing = [column for column in needed if column not in present]
    if missing:
        raise ValueError(
            f"{row.place}: field {missing[0]!r} is missing (columns {sorted(present)}); this task "
            f"needs {rule}. Add it or remove the row."
        )


def _with_prompt(row: Row) -> Row:
    """Take what both answers begin with as the prompt."""
    from trl import extract_prompt

    chosen, rejected = row.values["chosen"], row.values["rejected"]
    if type(chosen) is not type(rejected) or not isinstance(chosen, str | list):
        raise ValueError(
            f"{row.place}: 'chosen' is a {type(chosen).__name__} and 'rejected' a "
            f"{type(rejected).__name__}; both must be strings or both lists of messages."
        )
    parts = extract_prompt({"chosen": chosen, "rejected": rejected})
    if not all(parts[name] for name in ("prompt", "chosen", "rejected")):
        raise ValueError(
            f"{row.place}: there is no 'prompt', and 'chosen' and 'rejected' do not both begin "
            "with one and go on differently; add the column prompt."
        )
    return Row(row.place, {**row.values, **parts})


def _prepare(
    config: TextDataConfig,
    tokenizer: "PreTrainedTokenizerBase",
    read: Callable[[Iterable[Row]], Iterator[tuple[Example, T]]],
    make: Callable[[list[tuple[Example, T]], str], tuple["Dataset", int]],
    columns: Sequence[str],
    max_length: int | None,
    warnings: list[str],
) -> PreparedData:
    """Read both parts of the data, encode them, and compare them."""

    def load(path: str, split: str, option: str) -> list[tuple[Example, T]]:
        rows = read_rows(path, name=config.name, split=split, option=option)
        found = list(read(rows))
        first = found[0][0]
        if isinstance(first.completion, list):
            check_template(first.place, bool(tokenizer.chat_template))
        return found

    train = load(config.path, config.split, "data.path")
    if source := config.evaluation_source():
        held_out = load(*source)
    else:
        train, held_out = _hold_out(train, config)
    data, longest = make(train, "training")
    evaluation = None
    if held_out:
        evaluation, _ = make(held_out, "evaluation")
        warnings += overlap_warning(
            row_digests(data, columns),
            row_digests(evaluation, columns),
            "evaluation examples",
            evaluation["place"],
        )
    return PreparedData(data, evaluation, min(longest, max_length or longest), warnings)


def _hold_out(
    found: list[tuple[Example, T]], config: TextDataConfig
) -> tuple[list[tuple[Example, T]], list[tuple[Example, T]]]:
    """Hold out rows of the data, of which each may have given several examples."""
    rows = list(dict.fromkeys(example.place for example, _ in found))
    _, places = split_places(len(rows), config.eval_fraction, config.seed)
    names = {rows[place] for place in places}
    held_out = [pair for pair in found if pair[0].place in names]
    return [pair for pair in found if pair[0].place not in names], held_out


def _without_completion(data: "Dataset") -> list[bool]:
    return [num == 0 for num in data["num_kept"]]


def _too_long(data: "Dataset") -> list[bool]:
    pairs = zip(data["num_tokens"], data["input_ids"], strict=True)
    return [num > len(ids) for num, ids in pairs]


def _leave_out_pairs(
    data: "Dataset",
    is_lost: list[bool],
    what: str,
    max_length: int | None,
    warnings: list[str],
) -> "Dataset":
    """Leave out pairs of which one answer does not fit; rows 2i and 2i + 1 are a pair."""
    lost = [i for i in range(0, len(data), 2) if is_lost[i] or is_lost[i + 1]]
    if not lost:
        return data
    if 2 * len(lost) == len(data):
        raise ValueError(
            f"all {len(lost)} {what} pairs are longer than `training.max_length` ({max_length}) "
            "allows; raise it or shorten the texts."
        )
    warnings.append(
        f"{len(lost)} of {len(data) // 2} {what} pairs do not fit into `training.max_length` "
        f"({max_length}) and are left out: {some([data[i]['place'] for i in lost])}."
    )
    kept = [i for i in range(len(data)) if i - i % 2 not in set(lost)]
    return data.select(kept, keep_in_memory=True)


def _learned_span(row: dict[str, Any]) -> tuple[int, int]:
    """Return where the answer begins, and where its last learned token ends."""
    learned = [i for i, label in enumerate(row["labels"]) if label != IGNORED]
    return learned[0], learned[-1] + 1


def _join_pair(chosen: dict[str, Any], rejected: dict[str, Any], scored: bool) -> dict[str, Any]:
    ids, others = chosen["input_ids"], rejected["input_ids"]
    if scored:
        return {"place": chosen["place"], "chosen_ids": ids, "rejected_ids": others}
    (start, end), (other_start, other_end) = _learned_span(chosen), _learned_span(rejected)
    start = min(start, other_start, common_prefix(ids[:start], others[:other_start]))
    return {
        "place": chosen["place"],
        "prompt_ids": ids[:start],
        "chosen_ids": ids[start:end],
        "rejected_ids": others[start:other_end],
    }


def _dataset(rows: list[dict[str, Any]], columns: Sequence[str]) -> "Dataset":
    from datasets import Dataset, Features, List, Value

    kinds = {name: Value("bool") if name == "label" else List(Value("int32")) for name in columns}
    features = Features({"place": Value("string"), **kinds})
    return Dataset.from_list(rows, features=features)
