"""Fine-tuning of an encoder that tells texts of some classes apart."""

import hashlib
from dataclasses import dataclass, field
from typing import Any, ClassVar, cast

import torch
from datasets import Dataset
from peft import PeftConfig
from torch import Tensor, nn
from transformers import (
    AutoModelForSequenceClassification,
    DataCollatorWithPadding,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainingArguments,
)

from pacatune import pretrained
from pacatune.data.checks import overlap_warning
from pacatune.data.config import check_counts, check_fraction
from pacatune.data.read import read_rows
from pacatune.methods import CLASSIFIER_METHODS
from pacatune.precision import dtype_name, torch_dtype
from pacatune.training.arguments import SharedDefaults
from pacatune.training.config import BaseRunConfig, ModelConfig
from pacatune.training.task import (
    Plan,
    Prepared,
    Task,
    make_adapter_config,
    make_plan,
    put_adapter,
)
from pacatune.training.trainer import RunTrainer, accuracy


@dataclass(kw_only=True)
class TextClassConfig:
    """Texts, each of one class."""

    path: str = ""
    """Training data with columns `text` and `label`: a file, a folder, or a hub data set id."""

    split: str = "train"
    """Split of a hub data set to train on."""

    eval_fraction: float = 0.1
    """Fraction of the training data held out for evaluation."""

    seed: int = 0
    """Seed for choosing the held-out rows."""

    num_train: int | None = None
    """Train on this many rows; all where null."""

    max_length: int = 128
    """Tokens at which texts are cut."""

    def __post_init__(self) -> None:
        if not self.path:
            raise ValueError(
                f"`data.path` is {self.path!r}; give a file with columns text and label."
            )
        check_fraction(self.eval_fraction)
        check_counts(self, "num_train", "max_length")


@dataclass
class ClassifierTrainingConfig(SharedDefaults, TrainingArguments):
    """Every option of transformers' TrainingArguments, with these defaults."""

    warmup_steps: float = 0.1
    """Steps in which the learning rate rises; below 1, a share of all steps."""

    per_device_train_batch_size: int = 16
    """Texts per device and step."""

    per_device_eval_batch_size: int = 64
    """Texts per device and evaluation step."""


@dataclass(kw_only=True)
class ClassifierConfig(BaseRunConfig[Any]):
    """One fine-tuning run of a classifier of texts; its head is new and trained in any case."""

    command: ClassVar[str] = "classify"
    methods: ClassVar[tuple[str, ...]] = CLASSIFIER_METHODS
    task_class: ClassVar[str] = "pacatune.training.classifier:ClassifierTask"

    model: ModelConfig
    """An encoder, or any model that transformers can put a classifier on."""

    data: TextClassConfig
    """Texts and labels."""

    training: ClassifierTrainingConfig = field(default_factory=ClassifierTrainingConfig)
    """Every option of transformers' TrainingArguments."""

    def __post_init__(self) -> None:
        if self.model.quantization is not None:
            raise ValueError(
                f"`model.quantization` ({self.model.quantization!r}) is not offered for "
                "classifiers; leave it out."
            )
        super().__post_init__()


class ClassifierTask(Task[ClassifierConfig]):
    """A run on texts with classes; studies measure it and keep nothing else."""

    unit = "texts"
    less_memory = "`data.max_length`"

    tokenizer: PreTrainedTokenizerBase
    classes: list[str]

    def plan(self) -> Plan:
        """Say what would be trained; of the data, only the labels are used."""
        return self._plan(split_texts(self.config.data)[0].classes())[0]

    def _plan(self, classes: list[str]) -> tuple[Plan, PeftConfig | None]:
        config = self.config
        model_config = pretrained.load_config(config.model.path, revision=config.model.revision)
        model_config.num_labels = len(classes)
        model = pretrained.empty_model(AutoModelForSequenceClassification, model_config)
        # PEFT adds the head to it
        adapter = make_adapter_config(config, model, task_type="SEQ_CLS")
        plan = make_plan(model, lambda base: self._make_trainable(base, adapter), config)
        return plan, adapter

    def prepare(self) -> Prepared:
        """Read and encode the texts, and plan what is trained."""
        config = self.config
        train, held_out = split_texts(config.data)
        self.classes = train.classes()
        path = pretrained.find_model(config.model.path)
        self.tokenizer = pretrained.load_tokenizer(path, revision=config.model.revision)
        plan, adapter = self._plan(self.classes)
        return Prepared(
            train=self.encode(train),
            evaluation=self.encode(held_out) if held_out.texts else None,
            fingerprint=train.fingerprint(),
            about_data=f"{len(train.texts):,} texts of {len(self.classes)} classes, "
            f"{len(held_out.texts):,} held out; a new head",
            adapter_config=adapter,
            plan=plan,
            model=path,
            dtype=dtype_name(self._dtype()),
            warnings=overlap_warning(train.texts, held_out.texts, "validation texts"),
        )

    def encode(self, texts: "LabelledTexts") -> Dataset:
        """Return texts as rows of `input_ids`, `attention_mask` and `labels`."""
        from datasets import Dataset

        if unknown := sorted(set(texts.labels) - set(self.classes)):
            raise ValueError(f"the labels {unknown[:5]} are not among those of the training data.")
        limit = self.config.data.max_length
        columns = self.tokenizer(texts.texts, truncation=True, max_length=limit)
        columns = {key: columns[key] for key in ("input_ids", "attention_mask")}
        labels = [self.classes.index(label) for label in texts.labels]
        return Dataset.from_dict({**columns, "labels": labels})

    def load_model(self) -> nn.Module:
        """Load an encoder and put a new head for the classes on it."""
        model: nn.Module = pretrained.load_weights(
            AutoModelForSequenceClassification,
            self.config.model.path,
            dtype=self._dtype(),
            revision=self.config.model.revision,
            num_labels=len(self.classes),
            attn_implementation=self.config.model.attn_implementation,
            ignore_mismatched_sizes=True,
            use_safetensors=True,
        )
        return model

    def _dtype(self) -> torch.dtype:
        name = self.config.model.dtype
        return torch.float32 if name == "auto" else torch_dtype(name)

    def collate(self, examples: Any, places: list[int]) -> dict[str, Tensor]:
        """Return some texts as one padded batch."""
        collate = DataCollatorWithPadding(self.tokenizer)
        return dict(collate([examples[place] for place in places]))

    def make_trainer(
        self, model: nn.Module, adapter_config: PeftConfig | None, **options: Any
    ) -> "ClassifierTrainer":
        """Return the trainer, which measures accuracy."""
        return ClassifierTrainer(
            model=self._make_trainable(model, adapter_config),
            data_collator=DataCollatorWithPadding(self.tokenizer),
            compute_metrics=accuracy,
            **options,
        )

    def _make_trainable(self, model: nn.Module, adapter: PeftConfig | None) -> nn.Module:
        """Put the adapter on a model, or set which of its weights are trained."""
        if self.config.method == "head":
            cast(PreTrainedModel, model).base_model.requires_grad_(False)
        return put_adapter(model, adapter)


class ClassifierTrainer(RunTrainer):
    """Trainer of classifiers, whose batches are counted by their labels."""


@dataclass(frozen=True, kw_only=True)
class LabelledTexts:
    """Texts of some classes."""

    texts: list[str]
    labels: list[str]

    def classes(self) -> list[str]:
        """Return the different labels, in order."""
        return sorted(set(self.labels))

    def fingerprint(self) -> str:
        """Return a digest of all texts and labels, in order."""
        digest = hashlib.blake2b(digest_size=16)
        for text, label in zip(self.texts, self.labels, strict=True):
            digest.update(f"{text}\0{label}\0".encode())
        return digest.hexdigest()

    def part(self, places: list[int]) -> "LabelledTexts":
        """Return those at some places."""
        return LabelledTexts(
            texts=[self.texts[place] for place in places],
            labels=[self.labels[place] for place in places],
        )


def read_texts(path: str, split: str, option: str = "data.path") -> LabelledTexts:
    """Read texts and labels from a file, folder or data set of the hub."""
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
    """Return what is trained on and what is held out."""
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
