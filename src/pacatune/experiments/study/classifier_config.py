"""One run of the classifier recipe, declared once."""

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from transformers import TrainingArguments

from pacatune.methods import CLASSIFIER_METHODS
from pacatune.training.any_run import settle
from pacatune.training.arguments import SharedDefaults
from pacatune.training.config import LoraSection, ModelConfig, MosLoraSection, PacaSection


@dataclass(kw_only=True)
class TextClassConfig:
    """Texts, each of one class.

    Raises:
        ValueError: If `path` is missing or a number is out of its range.
    """

    path: str = ""
    """Training data with columns `text` and `label`: a file, a folder, or a hub data set id."""

    split: str = "train"
    """Split of a hub data set to train on."""

    eval_path: str | None = None
    """Evaluation data, as `path`."""

    eval_split: str | None = None
    """Split of a hub data set to evaluate on."""

    eval_fraction: float = 0.1
    """Fraction of the training data held out for evaluation."""

    seed: int = 0
    """Seed of the choice of the held-out rows."""

    num_train: int | None = None
    """Train on this many rows; all where null."""

    max_length: int = 128
    """Tokens at which texts are cut."""

    def __post_init__(self) -> None:
        if not self.path:
            raise ValueError(
                f"`data.path` is {self.path!r}; give a file with columns text and label."
            )
        if not 0 <= self.eval_fraction < 1:
            raise ValueError(f"`data.eval_fraction` ({self.eval_fraction}) must be in [0, 1).")
        for name in ("num_train", "max_length"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"`data.{name}` ({value}) must be at least 1.")


@dataclass
class ClassifierTrainingConfig(SharedDefaults, TrainingArguments):  # type: ignore[misc]
    """Every option of transformers' TrainingArguments, with these defaults."""

    warmup_steps: float = 0.1
    """Steps in which the learning rate rises; below 1, a share of all steps."""

    per_device_train_batch_size: int = 16
    """Texts per device and step."""

    per_device_eval_batch_size: int = 64
    """Texts per device and evaluation step."""


@dataclass(kw_only=True)
class ClassifierConfig:
    """One fine-tuning run of a classifier.

    Raises:
        ValueError: If the sections contradict each other.
        TypeError: If `training` is of another class.
    """

    command: ClassVar[str] = "classify"
    methods: ClassVar[tuple[str, ...]] = CLASSIFIER_METHODS

    method: str = "paca"
    """How to fine-tune; the head is new and trained in any case."""

    model: ModelConfig
    """An encoder, or any model that transformers can put a classifier on."""

    data: TextClassConfig
    """Texts and labels."""

    paca: PacaSection = field(default_factory=PacaSection)
    """Options of the method paca."""

    lora: LoraSection = field(default_factory=LoraSection)
    """Options of the methods lora, lora_dropout, dora and moslora."""

    moslora: MosLoraSection = field(default_factory=MosLoraSection)
    """Options of the method moslora."""

    training: ClassifierTrainingConfig = field(default_factory=ClassifierTrainingConfig)
    """Every option of transformers' TrainingArguments."""

    lean: Literal["auto", "off", "require"] = "auto"
    """As in `pacatune train`."""

    early_stopping_patience: int | None = None
    """As in `pacatune train`."""

    def __post_init__(self) -> None:
        if self.model.quantization is not None:
            raise ValueError(
                f"`model.quantization` ({self.model.quantization!r}) is not offered for "
                "classifiers; leave it out."
            )
        settle(self, ClassifierTrainingConfig)
