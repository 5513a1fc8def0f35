"""Fine-tuning of a model that tells texts of some classes apart; its head is new."""

import re
from collections.abc import Iterable
from typing import Any

from datasets import Dataset
from transformers import DataCollatorWithPadding

from pacatune.data import PreparedData
from pacatune.data.checks import overlap_warning
from pacatune.data.config import TextClassConfig
from pacatune.data.formats import to_texts
from pacatune.data.prepare import find_examples, hold_out
from pacatune.training.language import LanguageTask
from pacatune.training.trainer import accuracy


def prepare(task: LanguageTask) -> PreparedData:
    """Read and encode the texts; the model gets a head for their classes."""
    if task.tokenizer.pad_token is None:
        task.tokenizer.pad_token = task.tokenizer.eos_token  # as Llama's; saved with the result
    train, held_out = split_texts(task.config.data)
    classes = sort_labels(train["label"][:])
    task.model_options = {
        "num_labels": len(classes),
        "id2label": dict(enumerate(classes)),
        "label2id": {name: number for number, name in enumerate(classes)},
    }
    task.length_option = task.less_memory = "`data.max_length`"
    task.collator = DataCollatorWithPadding(task.tokenizer)
    task.trainer_options = {"data_collator": task.collator, "compute_metrics": accuracy}
    rows = encode(task, train, classes)
    return PreparedData(
        rows,
        encode(task, held_out, classes) if len(held_out) else None,
        max(map(len, rows["input_ids"])),
        overlap_warning(train["text"][:], held_out["text"][:], "validation texts"),
    )


def sort_labels(labels: Iterable[str]) -> list[str]:
    """Return the classes in order, whole numbers by their size."""
    classes = {*labels}
    if all(re.fullmatch("-?[0-9]+", name) for name in classes):
        return sorted(classes, key=lambda name: (int(name), name))
    return sorted(classes)


def encode(task: LanguageTask, texts: Dataset, classes: list[str]) -> Dataset:
    """Return texts as rows of `input_ids`, `attention_mask` and `labels`."""
    labels = texts["label"][:]
    if unknown := sorted({*labels} - {*classes}):
        raise ValueError(f"the labels {unknown[:5]} are not among those of the training data.")
    limit = task.config.data.max_length
    columns: Any = task.tokenizer(texts["text"][:], truncation=True, max_length=limit)
    columns = {key: columns[key] for key in ("input_ids", "attention_mask")}
    return Dataset.from_dict({**columns, "labels": list(map(classes.index, labels))})


def split_texts(config: TextClassConfig) -> tuple[Dataset, Dataset]:
    """Return what is trained on and what is held out."""
    (found,), elsewhere = find_examples(config, to_texts)
    whole, other = Dataset.from_list([*found]), elsewhere and Dataset.from_list([*elsewhere])
    rest, held_out = hold_out(range(len(whole)), 0 if other else config.eval_fraction, config.seed)
    train = whole.select(rest[: config.num_train])
    if (config.num_train or 0) > len(train):
        raise ValueError(
            f"`data.num_train` ({config.num_train}) must be at most {len(train)}, the rows of "
            f"{config.path} that are not held out."
        )
    if len(labels := set(train["label"][:])) < 2:
        raise ValueError(
            f"{config.path} has the labels {sorted(labels)}; a classifier needs at least two."
        )
    return train, other or whole.select(held_out)
