"""Texts with labels: read, split, turned into tokens."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from pacatune.data.read import read_rows
from pacatune.experiments.study.classifier_config import TextClassConfig

if TYPE_CHECKING:
    from datasets import Dataset


@dataclass(frozen=True, kw_only=True)
class LabelledTexts:
    """Texts of some classes."""

    texts: list[str]
    labels: list[str]

    def part(self, places: list[int]) -> "LabelledTexts":
        """Return those at some places."""
        return LabelledTexts(
            texts=[self.texts[place] for place in places],
            labels=[self.labels[place] for place in places],
        )


def read_texts(path: str, split: str, option: str = "data.path") -> LabelledTexts:
    """Read texts and labels.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If a row has no text or label; names it.
    """
    texts, labels = [], []
    for row in read_rows(path, name=None, split=split, option=option):
        text, label = row.values.get("text"), row.values.get("label")
        if not isinstance(text, str) or not text.strip() or label is None or label == "":
            raise ValueError(
                f"{row.place} has text {str(text)[:40]!r} and label {label!r}; a classifier needs "
                "both, in columns of these names."
            )
        texts.append(text)
        labels.append(str(label))
    return LabelledTexts(texts=texts, labels=labels)


def split_texts(config: TextClassConfig) -> tuple[LabelledTexts, LabelledTexts]:
    """Return what is trained on and what is held out of it.

    Raises:
        ValueError: If there are too few rows or classes.
    """
    whole = read_texts(config.path, config.split)
    order = torch.randperm(
        len(whole.texts), generator=torch.Generator().manual_seed(config.seed)
    ).tolist()
    number = max(1, round(len(order) * config.eval_fraction)) if config.eval_fraction else 0
    held_out, rest = order[:number], order[number:][: config.num_train]
    if not rest or (config.num_train or 0) > len(rest):
        raise ValueError(
            f"{config.path} has {len(order)} rows, of which {number} are held out; `data.num_train`"
            f" ({config.num_train}) must be at most the rest."
        )
    train = whole.part(rest)
    if len(set(train.labels)) < 2:
        raise ValueError(
            f"{config.path} has the labels {sorted(set(train.labels))}; a classifier needs at "
            "least two."
        )
    return train, whole.part(held_out)


def encode(data: LabelledTexts, classes: list[str], tokenizer: Any, max_length: int) -> "Dataset":
    """Return rows of `input_ids`, `attention_mask` and `labels`.

    Raises:
        ValueError: If a label is not among the classes.
    """
    from datasets import Dataset

    if unknown := sorted(set(data.labels) - set(classes)):
        raise ValueError(f"the labels {unknown[:5]} are not among those of the training data.")
    columns = tokenizer(data.texts, truncation=True, max_length=max_length)
    columns = {key: columns[key] for key in ("input_ids", "attention_mask")}
    labels = [classes.index(label) for label in data.labels]
    return Dataset.from_dict({**columns, "labels": labels})
