"""Prompts that a model answers while it trains, from files or made by reasoning-gym."""

import json
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from pacatune.data.checks import overlap_warning
from pacatune.data.config import REASONING_GYM, PromptDataConfig
from pacatune.data.formats import check_json, check_unused, present_columns, to_prompt
from pacatune.data.prepare import PreparedData, check_template, split_places
from pacatune.data.read import Row, read_rows
from pacatune.installation import require_extra
from pacatune.names import choose

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

INDEX = "reasoning_gym_index"
"""Column with the number of an example among those that reasoning-gym has made."""

# What TRL gives to reward functions beside the columns of the data, and what it reads of them.
_TAKEN = (
    "prompts",
    "completions",
    "completion",
    "completion_ids",
    "trainer_state",
    "log_extra",
    "log_metric",
    "environment",
    "environments",
    "image",
)
_DEFAULT_SIZE = 1000


def prepare_prompts(
    config: PromptDataConfig, tokenizer: "PreTrainedTokenizerBase", *, num_new_tokens: int
) -> PreparedData:
    """Read and check prompts; their rows have `prompt`, `place` and all other columns.

    `longest` counts the tokens of the longest prompt and `num_new_tokens` behind it.
    """
    train = _load(config, tokenizer, config.path, config.split, "data.path")
    if source := config.evaluation_source():
        held_out = _load(config, tokenizer, *source)
    else:
        train, held_out = _hold_out(train, config)
    lengths = [_num_tokens(row, tokenizer) for row in train]
    known, held = ([json.dumps(row["prompt"]) for row in rows] for rows in (train, held_out))
    warnings = overlap_warning(
        known, held, "evaluation prompts", [row["place"] for row in held_out]
    )
    return PreparedData(
        _dataset(train),
        _dataset(held_out) if held_out else None,
        max(lengths) + num_new_tokens,
        warnings,
    )


def prompt_ids(
    prompt: str | list[dict[str, Any]], tokenizer: "PreTrainedTokenizerBase"
) -> list[int]:
    """Return the tokens of a prompt, as TRL gives them to the model."""
    if isinstance(prompt, str):
        return list(tokenizer(prompt)["input_ids"])
    ids: Any = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=True)
    return list(ids["input_ids"])


def reasoning_gym_data(config: PromptDataConfig) -> Any:
    """Return the data set that reasoning-gym generates for a run: item i is always the same."""
    require_extra(f"`data.path` ({config.path!r})", "rl", ("reasoning_gym",))
    import reasoning_gym
    from reasoning_gym.factory import DATASETS

    name = choose(config.path.removeprefix(REASONING_GYM), sorted(DATASETS), option="data.path")
    size = _DEFAULT_SIZE if config.size is None else config.size
    try:
        return reasoning_gym.create_dataset(
            name, size=size, seed=config.seed, **(config.options or {})
        )
    except (TypeError, AssertionError, ValueError) as error:
        raise ValueError(
            f"reasoning-gym does not make {name!r} with `data.options` ({config.options}), "
            f"`data.size` ({size}): {error}."
        ) from error


def _load(
    config: PromptDataConfig,
    tokenizer: "PreTrainedTokenizerBase",
    path: str,
    split: str,
    option: str,
) -> list[dict[str, Any]]:
    rows: Iterable[Row]
    if config.is_generated:
        rows = _generate(config, is_chat=bool(tokenizer.chat_template))
    else:
        rows = read_rows(path, name=config.name, split=split, option=option)
    found = [to_row(row, config.system_prompt) for row in rows]
    has_template = bool(tokenizer.chat_template)
    for row in found:
        if isinstance(row["prompt"], list):
            check_template(row["place"], has_template)
            break
    kinds = {type(row["prompt"]): row["place"] for row in reversed(found)}
    if len(kinds) > 1:
        raise ValueError(
            f"{kinds[str]} has a text as prompt, and {kinds[list]} a chat; one run takes one of "
            "them: convert the others."
        )
    # Every reward function gets every column, with None where a row lacks it.
    columns = dict.fromkeys(column for row in found for column in row)
    return [{column: row.get(column) for column in columns} for row in found]


def _hold_out(
    rows: list[dict[str, Any]], config: PromptDataConfig
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Hold out a part of the rows; what is generated twice is in one part."""
    keys = [json.dumps(row["prompt"]) if config.is_generated else row["place"] for row in rows]
    names = list(dict.fromkeys(keys))
    _, places = split_places(len(names), config.eval_fraction, config.seed)
    held_out = {names[place] for place in places}
    pairs = list(zip(keys, rows, strict=True))
    return (
        [row for key, row in pairs if key not in held_out],
        [row for key, row in pairs if key in held_out],
    )


def _generate(config: PromptDataConfig, *, is_chat: bool) -> Iterator[Row]:
    data = reasoning_gym_data(config)
    for index in range(len(data)):
        entry = data[index]
        question = entry["question"]
        yield Row(
            f"{config.path}, item {index + 1}",
            {
                "prompt": [{"role": "user", "content": question}] if is_chat else question,
                "answer": entry["answer"],
                INDEX: index,
            },
        )


def to_row(row: Row, system_prompt: str | None) -> dict[str, Any]:
    """Return a checked row with its prompt, and place."""
    present = present_columns(row)
    if "prompt" not in present:
        raise ValueError(
            f"{row.place}: field 'prompt' is missing (columns {sorted(present)}); this task needs "
            "it, and gives all other columns to the reward functions. Add it or remove the row."
        )
    check_unused(row, "prompt")
    if taken := sorted({"place", *_TAKEN} & row.values.keys()):
        raise ValueError(
            f"{row.place}: column {taken[0]!r} has the name of an argument that every reward "
            "function gets; rename it."
        )
    prompt = to_prompt(row)
    if system_prompt is not None:
        chat = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        has_system = chat[0]["role"] == "system"
        prompt = chat if has_system else [{"role": "system", "content": system_prompt}, *chat]
    return {**row.values, "prompt": prompt, "place": row.place}


def _num_tokens(row: dict[str, Any], tokenizer: "PreTrainedTokenizerBase") -> int:
    from jinja2 import TemplateError

    try:
        return len(prompt_ids(row["prompt"], tokenizer))
    except (TemplateError, TypeError) as error:
        raise ValueError(
            f"{row['place']}: the chat template cannot render it ({error}); "
            "change the messages, or give another `data.chat_template`."
        ) from error


def _dataset(rows: list[dict[str, Any]]) -> "Dataset":
    """Return rows as a data set that gives them back as they are.

    They are held as JSON: a table would give all of a column one type, and objects in it the same
    fields.
    """
    from datasets import Dataset

    def decode(batch: dict[str, list[str]]) -> dict[str, list[Any]]:
        found = [json.loads(text) for text in batch["row"]]
        columns = {column: [row[column] for row in found] for column in found[0]}
        return {**columns, "place": batch["place"]}

    # Apart, since the same rows may lie elsewhere when a run is resumed.
    places = [row.pop("place") for row in rows]
    for place, row in zip(places, rows, strict=True):
        for name, value in row.items():
            check_json(value, f"{place}: column {name!r}")
    texts = [json.dumps(row) for row in rows]
    return Dataset.from_dict({"row": texts, "place": places}).with_transform(decode)
