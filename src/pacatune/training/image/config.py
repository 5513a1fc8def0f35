"""One run on images, declared once for the command line, YAML files and Python."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Literal

from transformers import TrainingArguments

from pacatune.data.images import ImageDataConfig
from pacatune.methods import CLASSIFIER_METHODS
from pacatune.training.arguments import SharedDefaults, refuse_elsewhere
from pacatune.training.config import BaseRunConfig

if TYPE_CHECKING:
    from pacatune.training.image.report import ImageReport  # noqa: F401 (of the run's type)

# Options of TrainingArguments that this task decides elsewhere, and where.
_ELSEWHERE = {
    "remove_unused_columns": "the data has the columns that training needs",
    "label_names": "the class of an image is its only label",
    "prediction_loss_only": "the accuracy is always measured",
    "batch_eval_metrics": "the accuracy is measured over all images at once",
}


@dataclass(kw_only=True)
class ImageModelConfig:
    """The pretrained model. Code that comes with a model is never executed.

    Raises:
        ValueError: If `path` is missing.
    """

    path: str = ""
    """Hub id (of transformers, or timm/...), name of a timm model, or local folder of an image
    model. Required."""

    revision: str | None = None
    """Branch, tag or commit of a hub model."""

    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the weights. bfloat16 halves their memory, and a head in it learns less exactly."""

    attn_implementation: str | None = None
    """Attention: eager, sdpa, ...; the model's own choice where null."""

    def __post_init__(self) -> None:
        if not self.path:
            raise ValueError(
                f"`model.path` is {self.path!r}; give a hub id, the name of a timm model, or the "
                "folder of a model."
            )


@dataclass
class ImageTrainingConfig(SharedDefaults, TrainingArguments):  # type: ignore[misc]
    """Every option of transformers' TrainingArguments, with these defaults.

    Raises:
        ValueError: If an option is set that this task decides elsewhere or does not offer.
    """

    learning_rate: float | None = None
    """Peak learning rate; where null, that of the method: 1e-3 paca, lora, dora and moslora, 3e-3
    head, 1e-4 full."""

    warmup_steps: float = 0.1
    """Steps in which the learning rate rises; below 1, a share of all steps. A new head is random,
    and what it asks of the other layers is too, until it has learnt something."""

    per_device_train_batch_size: int = 32
    """Images per device and step."""

    per_device_eval_batch_size: int = 64
    """Images per device and evaluation step."""

    remove_unused_columns: bool = False
    """Not offered."""

    train_batch_norm: bool = False
    """Let BatchNorm normalise by the batch and update its running statistics, which are saved and
    restored with the result. Otherwise it stays as it was pretrained."""

    mixup_alpha: float = 0.0
    """Mix pairs of training images and their classes, in shares drawn from Beta(alpha, alpha); 0
    mixes nothing."""

    def check_options(self) -> None:
        """Refuse options that this task decides elsewhere, and numbers that train nothing."""
        super().check_options()
        refuse_elsewhere(self, _ELSEWHERE)
        if self.mixup_alpha < 0:
            raise ValueError(
                f"`training.mixup_alpha` ({self.mixup_alpha}) must be at least 0, which is off."
            )


@dataclass(kw_only=True)
class ImageRunConfig(BaseRunConfig["ImageReport"]):
    """One fine-tuning run on images.

    Raises:
        ValueError: If the sections contradict each other.
        TypeError: If `training` is not an ImageTrainingConfig.
    """

    command: ClassVar[str] = "train-image"
    methods: ClassVar[tuple[str, ...]] = CLASSIFIER_METHODS
    task: ClassVar[str] = "pacatune.training.image.task:ImageTask"

    method: str = "paca"
    """How to fine-tune: `paca`, `lora`, `lora_dropout`, `dora`, `moslora` (LoRA with a trained
    mixer; linear layers only), `full` (every weight), or `head` (the classifier alone, a linear
    probe). A new head is trained in any case."""

    model: ImageModelConfig
    """The pretrained model."""

    data: ImageDataConfig
    """Training and evaluation images."""

    training: ImageTrainingConfig = field(default_factory=ImageTrainingConfig)
    """Every option of transformers' TrainingArguments."""

    lean: Literal["auto", "off", "require"] = "auto"
    """Keep less for backward, exactly: gated MLPs, norms, BatchNorm, attention and loss as
    `pacatune.lean` makes them. `auto`: what can be; `require`: refuse a model that keeps more than
    it must."""
