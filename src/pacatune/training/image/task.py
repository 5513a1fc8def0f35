"""Fine-tuning of an image classifier: its data, model and trainer."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftConfig
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.transforms import v2
from transformers import TrainerCallback, default_data_collator

from pacatune.adapters.folder import SIDECAR_NAME
from pacatune.data.images import (
    Augmentation,
    ImageDataset,
    class_names,
    prepare_images,
    read_images,
)
from pacatune.installation import repository_command
from pacatune.methods import METHODS
from pacatune.precision import torch_dtype
from pacatune.training.image.model import (
    CLASSES_KEY,
    ImageBase,
    describe_base,
    find_batch_norms,
    load_model,
)
from pacatune.training.image.report import (
    ImageReport,
    draw_confusion,
    draw_mistakes,
    surest_mistakes,
)
from pacatune.training.image.targets import choose_adapter, make_trainable, plan_training
from pacatune.training.report import curve_of
from pacatune.training.task import Plan, Prepared, Task
from pacatune.training.trainer import RunTrainer, accuracy


class ImageTask(Task):
    """A run on images."""

    unit = "images"
    less_memory = "`data.image_size`, or set `training.gradient_checkpointing` to true"
    report_class = ImageReport

    base: ImageBase
    classes: list[str]
    evaluation: ImageDataset | None

    def plan(self) -> Plan:
        """Say what would be trained; of the images, only their classes are read."""
        base = self._describe_base(class_names(read_images(self.config.data)[0]))
        return plan_training(self.config, base, choose_adapter(self.config, base)[0])

    def prepare(self) -> Prepared:
        """Find images and model, and plan what is trained."""
        config = self.config
        data = prepare_images(config.data)
        self.classes = class_names(data.train)
        self.base = self._describe_base(self.classes)
        adapter_config, notes = choose_adapter(config, self.base)
        processor, size, augmentation = self.base.processor, self.base.size, None
        if config.data.augmentation != "none":
            augmentation = Augmentation(config.data.augmentation, size, config.training.seed)
        train = ImageDataset(data.train, processor, augmentation)
        self.evaluation, held_out = None, 0
        if data.evaluation is not None:
            self.evaluation = ImageDataset(data.evaluation, processor)
            held_out = len(self.evaluation)
        head = "the model's own head" if self.base.has_own_head else "a new head"
        return Prepared(
            train=train,
            evaluation=self.evaluation,
            fingerprint=data.fingerprint,
            about_data=f"{len(train):,} images of {len(self.classes)} classes, {held_out:,} held "
            f"out; {size} x {size} pixels, {head}",
            adapter_config=adapter_config,
            plan=plan_training(config, self.base, adapter_config),
            model=self.base.path,
            dtype=config.model.dtype,
            warnings=[*data.warnings, *self.base.warnings, *notes],
        )

    def _describe_base(self, classes: list[str]) -> ImageBase:
        model = self.config.model
        return describe_base(model.path, model.revision, classes, self.config.data.image_size)

    def load_model(self) -> nn.Module:
        """Load the weights; a new head gets random ones."""
        model = self.config.model
        return load_model(self.base, torch_dtype(model.dtype), model.attn_implementation)

    def collate(self, examples: Any, places: list[int]) -> dict[str, Tensor]:
        """Return some images as one batch."""
        return default_data_collator([examples[place] for place in places])

    def loss(self, model: Any, batch: dict[str, Tensor]) -> Tensor:
        """Return the cross-entropy of a batch of `collate`."""
        moved = {key: value.to(model.device) for key, value in batch.items()}
        labels = moved.pop("labels")
        logits = model(**moved)["logits"].float()
        return F.cross_entropy(logits, labels)

    def make_trainer(
        self, model: nn.Module, adapter_config: PeftConfig | None, **options: Any
    ) -> "ImageTrainer":
        """Return the trainer, which tells the training images the number of the pass."""
        options["args"].label_names = ["labels"]
        options["callbacks"].append(NewEpoch(options["train_dataset"]))
        return ImageTrainer(
            model=make_trainable(model, self.config, adapter_config),
            **options,
        )

    def evaluate(self, trainer: Any) -> dict[str, Any]:
        """Return loss, accuracy, confusion matrix and mistakes."""
        assert self.evaluation is not None
        result = trainer.predict(self.evaluation)
        logits, labels = result.predictions, result.label_ids
        counts = np.zeros((len(self.classes), len(self.classes)), np.int64)
        np.add.at(counts, (labels, logits.argmax(axis=1)), 1)
        return {
            "eval_loss_after": float(result.metrics["test_loss"]),
            "accuracy_after": float(result.metrics["test_accuracy"]),
            "confusion": counts.tolist(),
            "mistakes": surest_mistakes(logits, labels, self.evaluation),
        }

    def more_results(self, trainer: Any, items_per_second: float) -> dict[str, Any]:
        """Return accuracies, images per second, and what model and data are."""
        curve = curve_of(trainer.state.log_history, "eval_accuracy")
        return {
            "accuracy_before": curve[0][1] if curve else None,
            "eval_accuracies": curve,
            "images_per_second": items_per_second,
            "head": "own" if self.base.has_own_head else "new",
            "classes": self.classes,
            "image_size": self.base.size,
        }

    def write(self, report: Any, folder: Path) -> None:
        """Write the transform, the classes beside an adapter, and the pictures."""
        self.base.processor.save_pretrained(folder)
        if METHODS[self.config.method].has_adapter:
            sidecar = json.dumps({CLASSES_KEY: self.classes}, indent=2, ensure_ascii=False)
            (folder / SIDECAR_NAME).write_text(sidecar + "\n", encoding="utf-8")
        if self.evaluation is not None:
            draw_confusion(report, folder / "confusion.png")
            if report.mistakes:
                draw_mistakes(report.mistakes, self.evaluation, folder / "mistakes.png")

    def how_to_load(self, report: Any) -> str:
        """Return the classes, and code that classifies an image."""
        classes = ", ".join(self.classes[:20]) + (", ..." if len(self.classes) > 20 else "")
        loading = (
            f"Tells apart {len(self.classes)} classes: {classes}.\n\n"
            f"Install pacatune ({repository_command('vision')}), then:\n\n"
            "```python\nfrom pacatune.training.image import load_result\n\n"
            'classifier = load_result("FOLDER")\n'
            'print(classifier.classify("IMAGE.png"))  # class -> probability\n```\n'
        )
        if METHODS[self.config.method].has_adapter:
            loading += (
                "\n`classifier.model` is a PEFT model; `classifier.model.merge_and_unload()` makes "
                "it a plain one.\n"
            )
        return loading


class ImageTrainer(RunTrainer):
    """Trainer of a model that turns `pixel_values` into `logits`."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(compute_loss_func=self._loss, compute_metrics=_measure, **kwargs)
        # The loss is ours, so nothing but pixels goes into the model.
        self.model_accepts_loss_kwargs = False
        self._batch_norms = find_batch_norms(self.model)

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Tensor:
        """Take one micro-batch forward and backward, its images mixed."""
        if self.args.mixup_alpha > 0:
            inputs = mix(inputs, self.args.mixup_alpha, self.model.config.num_labels)
        return super().training_step(model, inputs, *args, **kwargs)

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        """Compute the loss; Trainer has put all of the model into training mode before."""
        if not self.args.train_batch_norm:
            for layer in self._batch_norms.values():
                layer.eval()
        return super().compute_loss(model, inputs, *args, **kwargs)

    def _loss(
        self, outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Return the cross-entropy; smoothed in training only, so that losses can be compared."""
        logits = outputs["logits"].float()
        smoothing = self.args.label_smoothing_factor if logits.requires_grad else 0.0
        total = F.cross_entropy(logits, labels, reduction="sum", label_smoothing=smoothing)
        return total / (len(logits) if num_items_in_batch is None else num_items_in_batch)


def _measure(prediction: Any) -> dict[str, float]:
    """Return accuracy and loss, a mean over images, which Trainer's own is not in processes."""
    logits, labels = map(torch.from_numpy, (prediction.predictions, prediction.label_ids))
    return {**accuracy(prediction), "loss": float(F.cross_entropy(logits, labels))}


class NewEpoch(TrainerCallback):
    """Tells the training images the number of the pass, for other augmentations each time."""

    def __init__(self, dataset: Any) -> None:
        self._dataset = dataset

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Before the first batch is loaded; `state.epoch` also counts the steps of this one."""
        self._dataset.epoch.fill_(int(state.epoch or 0))


def mix(inputs: dict[str, Any], alpha: float, num_classes: int) -> dict[str, Any]:
    """Mix each image and its class with another's, all in one share from Beta(alpha, alpha)."""
    # In this order: torchvision takes the first tensor for the images, whatever its key.
    pixels, labels = v2.MixUp(alpha=alpha, num_classes=num_classes)(
        inputs["pixel_values"], inputs["labels"]
    )
    return {**inputs, "pixel_values": pixels, "labels": labels}
