"""Prompts that a model answers while it trains."""

import json
from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from pacatune.data.config import PromptDataConfig
from pacatune.data.encode import apply_template, reads_variable
from pacatune.data.formats import check_columns, row_variables, to_prompt
from pacatune.data.prepare import PreparedData, make_tables
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
    _, data = make_tables(config, partial(_encode, tokenizer=tokenizer), to_prompts)
    evaluation = None if data.evaluation is None else _decoded(data.evaluation)
    longest = data.longest + num_new_tokens
    return replace(data, train=_decoded(data.train), evaluation=evaluation, longest=longest)


def _encode(row: dict[str, Any], tokenizer: "PreTrainedTokenizerBase") -> dict[str, Any]:
    """Return a row as JSON, as a table would give objects the fields of all."""
    template, place = tokenizer.chat_template, row["place"]
    notes = ["plain"] if template and isinstance(row["prompt"], str) else []
    if not all(reads_variable(str(template), name) for name in row_variables(row)):
        notes.append("unread")
    try:
        text = json.dumps({column: value for column, value in row.items() if column != "place"})
    except TypeError as error:
        raise ValueError(f"{place}: a column is no JSON ({error}); write it as text.") from error
    number = len(prompt_ids(row, tokenizer))
    return {"place": place, "row": text, "num_tokens": number, "notes": notes}


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


def _decoded(data: "Dataset") -> "Dataset":
    """Give all rows all columns, with None where one lacks them: rewards get every column."""
    texts, places = data["row"][:], data["place"][:]
    rows = list(map(json.loads, texts))
    kinds = {type(row["prompt"]): place for row, place in zip(rows, places, strict=True)}
    if len(kinds) > 1:
        both = f"{kinds[str]} has a text as prompt, and {kinds[list]} a chat"
        raise ValueError(f"{both}; convert one of them.")
    columns = dict.fromkeys(column for row in rows for column in row)

    def decode(batch: dict[str, list[str]]) -> dict[str, list[Any]]:
        rows = [json.loads(text) for text in batch["row"]]
        decoded = {column: [row.get(column) for row in rows] for column in columns}
        return {**decoded, "place": batch["place"]}

    return data.select_columns(["row", "place"]).with_transform(decode)
