"""Fine-tuning of a model that tells texts of some classes apart."""

import re
from collections import defaultdict
from functools import partial
from typing import Any, cast

from datasets import Dataset
from transformers import DataCollatorWithPadding, PreTrainedTokenizerBase
from transformers.tokenization_utils_base import LARGE_INTEGER

from pacatune.data.checks import some
from pacatune.data.config import TextClassConfig
from pacatune.data.formats import to_texts
from pacatune.data.prepare import PreparedData, find_examples, hold_out
from pacatune.training.language import Task
from pacatune.training.task import TaskData
from pacatune.training.trainer import RunTrainer, accuracy


def prepare(task: Task) -> TaskData:
    """Read and encode the texts; the model gets a head for their classes."""
    tokenizer = task.tokenizer
    if tokenizer.pad_token is None:  # as Llama's
        tokenizer.pad_token = tokenizer.eos_token  # saved with the result
    train, held_out = split_texts(cast(TextClassConfig, task.config.data))
    classes, why_new = choose_classes(task.model_config, sort_labels(train))
    limit = _limit(task)
    encode = partial(_encode, limit, tokenizer, classes)
    (rows, cut), collator = encode(train), DataCollatorWithPadding(tokenizer)
    said = f"{len(cut)} of {len(train)} training texts are cut at {limit} tokens"
    warnings = [f"{said} (`data.max_length`): {some(cut)}."] if cut else []
    return TaskData(
        examples=PreparedData(
            rows,
            encode(held_out)[0] if len(held_out) else None,
            max(map(len, rows["input_ids"])),
            warnings,
        ),
        collator=collator,
        model_options={
            "num_labels": len(classes),
            "id2label": dict(enumerate(classes)),
            "label2id": {name: number for number, name in enumerate(classes)},
            # a checkpoint's own may bring another loss
            "problem_type": "single_label_classification",
        },
        trainer_options={"data_collator": collator, "compute_metrics": accuracy},
        new_head=why_new,
        length_option="`data.max_length`",
    )


class ClassTrainer(RunTrainer):
    """transformers' trainer."""

    prepare = staticmethod(prepare)


def choose_classes(model_config: Any, classes: list[str]) -> tuple[list[str], str | None]:
    """Return the classes in order, and why the model gets a new head for them; None: it has one.

    A checkpoint's head is kept only if it is for these very classes, by their names.
    """
    if "ForSequenceClassification" not in " ".join(model_config.architectures or ()):
        return classes, "the checkpoint has none"
    own = [model_config.id2label[number] for number in sorted(model_config.id2label)]
    if sorted(own) == sorted(classes):
        return own, None
    return classes, f"the checkpoint's is for {some(own)}"


def sort_labels(texts: Dataset) -> list[str]:
    """Return the classes of texts in order: a table's own, or whole numbers by their size."""
    classes = dict(zip(texts["label"][:], texts["number"][:], strict=True))
    if None not in classes.values():
        return sorted(classes, key=classes.__getitem__)
    if all(re.fullmatch("-?[0-9]+", name) for name in classes):
        return sorted(classes, key=lambda name: (int(name), name))
    return sorted(classes)


def _limit(task: Task) -> int | None:
    """Return the number of tokens that texts are cut at: as asked, or where the model ends."""
    asked, least = task.config.data.max_length, task.tokenizer.model_max_length
    if asked is not None or least < LARGE_INTEGER:  # what a tokenizer without a limit says
        return int(least if asked is None else asked)
    return getattr(task.model_config.get_text_config(), "max_position_embeddings", None)


def _encode(
    limit: int | None, tokenizer: PreTrainedTokenizerBase, classes: list[str], texts: Dataset
) -> tuple[Dataset, list[str]]:
    """Return texts as rows of `input_ids`, `attention_mask` and `labels`, and which were cut."""
    labels = texts["label"][:]
    if unknown := sorted({*labels} - {*classes}):
        raise ValueError(f"the labels {unknown[:5]} are not among those of the training data.")
    columns: Any = tokenizer(texts["text"][:], verbose=False)
    pairs = zip(columns["input_ids"], texts["place"][:], strict=True)
    cut = [place for ids, place in pairs if limit is not None and len(ids) > limit]
    if cut:
        columns = tokenizer(texts["text"][:], truncation=True, max_length=limit)
    columns = {key: columns[key] for key in ("input_ids", "attention_mask")}
    return Dataset.from_dict({**columns, "labels": list(map(classes.index, labels))}), cut


def split_texts(config: TextClassConfig) -> tuple[Dataset, Dataset]:
    """Return what is trained on, with rows of every class, and what is held out."""
    (examples,), elsewhere = find_examples(config, to_texts)
    whole, other = Dataset.from_list([*examples]), elsewhere and Dataset.from_list([*elsewhere])
    fraction = 0 if other else config.eval_fraction
    rest, held_out = hold_out_of_classes(whole["label"][:], fraction, config.seed)
    if len(labels := {*whole["label"]}) < 2:
        raise ValueError(
            f"{config.path} has the labels {sorted(labels)}; a classifier needs at least two."
        )
    return whole.select(rest), other or whole.select(held_out)


def hold_out_of_classes(
    labels: list[str], fraction: float, seed: int
) -> tuple[list[int], list[int]]:
    """Hold out about the same fraction of each class; return the places of both parts' rows.

    The first that is drawn of each class is trained on, before all others.
    """
    places = defaultdict[str, list[int]](list)
    for place in hold_out(range(len(labels)), 0, seed)[0]:
        places[labels[place]].append(place)
    firsts = [drawn.pop(0) for drawn in places.values()]
    shares = {
        place: (number + 0.5) / len(drawn)
        for drawn in places.values()
        for number, place in enumerate(drawn)
    }
    others, number = sorted(shares, key=shares.__getitem__), max(1, round(len(labels) * fraction))
    if fraction and number > len(others):
        raise ValueError(
            f"`data.eval_fraction` ({fraction}) of {len(labels)} rows leaves none to train on, or "
            "each is the only one of its class; give more data or `data.eval_path`, or set it to 0."
        )
    number = number if fraction else 0
    return firsts + others[number:], others[:number]
