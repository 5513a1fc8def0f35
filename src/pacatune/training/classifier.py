"""Fine-tuning of a model that tells texts of some classes apart; its head is new."""

from typing import Any

from datasets import Dataset
from transformers import DataCollatorWithPadding

from pacatune.data import PreparedData
from pacatune.data.checks import overlap_warning
from pacatune.data.config import TextClassConfig
from pacatune.data.prepare import hold_out
from pacatune.data.read import read_rows
from pacatune.training.language import LanguageTask
from pacatune.training.trainer import accuracy


def prepare(task: LanguageTask) -> PreparedData:
    """Read and encode the texts; the model gets a head for their classes."""
    train, held_out = split_texts(task.config.data)
    classes = sorted(set(train["label"][:]))
    task.model_options = {"num_labels": len(classes)}
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


def encode(task: LanguageTask, texts: Dataset, classes: list[str]) -> Dataset:
    """Return texts as rows of `input_ids`, `attention_mask` and `labels`."""
    labels = texts["label"][:]
    if unknown := sorted({*labels} - {*classes}):
        raise ValueError(f"the labels {unknown[:5]} are not among those of the training data.")
    limit = task.config.data.max_length
    columns: Any = task.tokenizer(texts["text"][:], truncation=True, max_length=limit)
    columns = {key: columns[key] for key in ("input_ids", "attention_mask")}
    return Dataset.from_dict({**columns, "labels": list(map(classes.index, labels))})


def read_texts(
    path: str, split: str, option: str = "data.path", name: str | None = None
) -> Dataset:
    """Read rows of `text` and `label`, a text too, from a file, folder or data set of the hub."""
    texts, labels = [], []
    for row in read_rows(path, name=name, split=split, option=option):
        text, label = row.values.get("text"), row.values.get("label")
        if not isinstance(text, str) or not text.strip() or label is None or label == "":
            raise ValueError(
                f"{row.place} has text {str(text)[:40]!r} and label {label!r}; a classifier needs "
                "both, in columns of these names."
            )
        texts.append(text)
        labels.append(str(label))
    return Dataset.from_dict({"text": texts, "label": labels})


def split_texts(config: TextClassConfig) -> tuple[Dataset, Dataset]:
    """Return what is trained on and what is held out."""
    whole, other = read_texts(config.path, config.split, name=config.name), None
    if source := config.evaluation_source():
        other = read_texts(source[0].path, source[0].split, source[1], config.name)
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
