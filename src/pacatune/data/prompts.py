"""Prompts that a model answers while it trains."""

import json
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from pacatune.data.checks import note_on
from pacatune.data.config import PromptDataConfig
from pacatune.data.encode import apply_template, reads_variable
from pacatune.data.formats import check_columns, row_variables, to_prompt
from pacatune.data.prepare import PreparedData, find_examples, hold_out
from pacatune.data.read import Row, named

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase


def prepare_prompts(
    config: PromptDataConfig, tokenizer: "PreTrainedTokenizerBase", *, num_new_tokens: int
) -> PreparedData:
    """Read and check prompts; their rows have `prompt`, `place` and all other columns.

    `longest` counts the tokens of the longest prompt and `num_new_tokens` behind it.
    """
    (examples,), other = find_examples(config, to_prompts)
    train, held_out = _complete(examples), _complete(other or ())
    if other is None:
        places = map(sorted, hold_out(range(len(train)), config.eval_fraction, config.seed))
        train, held_out = ([train[place] for place in part] for part in places)
    longest = max(len(prompt_ids(row, tokenizer)) for row in train)
    warnings: list[str] = []
    for note in ("plain", "unread"):
        where = [row["place"] for row in train if note in _notes(row, tokenizer.chat_template)]
        warnings += [note_on(note, where, f"{len(train)} prompts")] if where else []
    evaluation = _dataset(held_out) if held_out else None
    return PreparedData(_dataset(train), evaluation, longest + num_new_tokens, warnings)


def _notes(row: dict[str, Any], template: Any) -> set[str]:
    """Return what looks wrong with a prompt."""
    is_plain = template and isinstance(row["prompt"], str)
    is_read = all(reads_variable(str(template), name) for name in row_variables(row))
    return ({"plain"} if is_plain else set()) | (set() if is_read else {"unread"})


def prompt_ids(row: dict[str, Any], tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """Return the tokens of the prompt of a row, as the model gets them."""
    prompt = row["prompt"]
    if isinstance(prompt, str):
        return list(tokenizer(prompt)["input_ids"])
    options = row_variables(row) | {"add_generation_prompt": True, "return_dict": True}
    with named(row["place"]):
        return list(apply_template(tokenizer, prompt, **options)["input_ids"])


# What reward functions get beside the columns of the data, and what the model would see.
_TAKEN = {"place", "prompts", "completions", "completion", "completion_ids", "trainer_state"}
_TAKEN |= {"log_extra", "log_metric", "environment", "environments", "image", "images"}


def to_prompts(rows: Iterable[Row], format: str = "") -> Iterator[dict[str, Any]]:
    """Yield each row, checked, with its prompt and place."""
    for row in rows:
        with named(row.place):
            check_columns(row.values, "prompt")
            if taken := _TAKEN & row.values.keys():
                raise ValueError(
                    f"column {min(taken)!r} has the name of an argument that every reward function "
                    "gets, as it gets all columns; rename it."
                )
            prompt = to_prompt(row.values)
        yield {**row.values, "prompt": prompt, "place": row.place}


def _complete(examples: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Give all rows all columns, with None where one lacks them: rewards get every column."""
    rows = list(examples)
    kinds = {type(row["prompt"]): row["place"] for row in reversed(rows)}
    if len(kinds) > 1:
        both = f"{kinds[str]} has a text as prompt, and {kinds[list]} a chat"
        raise ValueError(f"{both}; convert one of them.")
    columns = dict.fromkeys(column for row in rows for column in row)
    return [{column: row.get(column) for column in columns} for row in rows]


def _dataset(rows: list[dict[str, Any]]) -> "Dataset":
    """Return rows as a data set of JSON, as a table would give objects the fields of all."""
    from datasets import Dataset

    def decode(batch: dict[str, list[str]]) -> dict[str, list[Any]]:
        rows = [json.loads(text) for text in batch["row"]]
        columns = {column: [row[column] for row in rows] for column in rows[0]}
        return {**columns, "place": batch["place"]}

    places = [row.pop("place") for row in rows]  # which may be others when a run is resumed
    try:
        texts = list(map(json.dumps, rows))
    except TypeError as error:
        raise ValueError(
            f"a column of the prompts is no JSON ({error}); write it as text."
        ) from error
    return Dataset.from_dict({"row": texts, "place": places}).with_transform(decode)
