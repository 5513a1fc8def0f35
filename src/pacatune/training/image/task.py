"""Fine-tuning of an image classifier: its data, model and trainer."""

import json
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftConfig
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.transforms import v2
from transformers import TrainerCallback, default_data_collator

from pacatune.adapters.folder import SIDECAR_NAME
from pacatune.data.config import ImageDataConfig
from pacatune.data.images import (
    Augmentation,
    ImageDataset,
    PreparedImages,
    class_names,
    prepare_images,
)
from pacatune.format.options import PACA_RANK
from pacatune.installation import install_command
from pacatune.methods import METHODS
from pacatune.precision import torch_dtype
from pacatune.training.image import report as pictures
from pacatune.training.image.model import ImageBase, choose_targets, find_batch_norms
from pacatune.training.report import curve_of, four_digits
from pacatune.training.task import (
    Plan,
    Prepared,
    Task,
    find_heads,
    make_adapter_config,
    make_plan,
    make_trainable,
)
from pacatune.training.trainer import RunTrainer, accuracy

_NARROWEST = 8
"""Input channels that a convolution needs to be adapted by the usual number of columns."""


class ImageTask(Task):
    """A run on images."""

    unit = "images"

    @cached_property
    def images(self) -> PreparedImages:
        """The images, found when they are first asked for."""
        return prepare_images(cast(ImageDataConfig, self.config.data))

    @cached_property
    def base(self) -> ImageBase:
        """The model without its weights."""
        source, size = self.config.model, self.config.data.image_size
        return ImageBase(source.path, source.revision, class_names(self.images.train), size)

    @cached_property
    def evaluation(self) -> ImageDataset | None:
        """The held-out images, as the model sees them."""
        held_out = self.images.evaluation
        return held_out and ImageDataset(held_out, self.base.processor)

    def _plan(self) -> tuple[Plan, PeftConfig | None, list[str]]:
        """Return what is trained of the model, the adapter and notes."""
        config, source, method = self.config, self.config.model, METHODS[self.config.method]
        model = self.base.empty_model()
        batch_norms = find_batch_norms(model) if config.training.train_batch_norm else {}
        if config.training.train_batch_norm and not batch_norms:
            raise ValueError(
                f"`training.train_batch_norm` is true, but {type(model).__name__} has no "
                "BatchNorm; leave it out."
            )
        adapter, notes = None, list[str]()
        if method.has_adapter:
            section = config.paca if method.is_paca else config.lora
            rank = _NARROWEST if method.is_paca and section.r == PACA_RANK else section.r
            # PEFT keeps adapters off them.
            saved = {*find_heads(model), *batch_norms, *(section.modules_to_save or [])}
            options: dict[str, Any] = {
                "modules_to_save": sorted(saved),
                "revision": source.revision,
            }
            if section.target_modules is None:
                options["target_modules"], notes = choose_targets(model, method, rank)
            adapter = make_adapter_config(config, model, **options)
        return make_plan(model, adapter, config), adapter, notes

    def prepare(self) -> Prepared:
        """Find images and model, and plan what is trained."""
        data, base, kind = self.images, self.base, self.config.data.augmentation
        (plan, adapter, notes), augmentation = self._plan(), None
        if kind != "none":
            augmentation = Augmentation(kind, base.size, self.config.training.seed)
        train = ImageDataset(data.train, base.processor, augmentation)
        head = "the model's own head" if base.has_own_head else "a new head"
        return Prepared(
            train=train,
            evaluation=self.evaluation,
            fingerprint=data.fingerprint,
            about_data=f"{len(train):,} images of {len(base.classes)} classes, "
            f"{len(self.evaluation or ()):,} held out; {base.size} x {base.size} pixels, {head}",
            adapter_config=adapter,
            plan=plan,
            model=base.path,
            has_new_head=not base.has_own_head,
            pipeline_tag=self.spec.kind.pipeline_tag,
            dtype=self.config.model.dtype,
            warnings=[*data.warnings, *notes],
        )

    def load_model(self) -> Any:
        """Load the weights; a new head gets random ones."""
        model = self.config.model
        return self.base.load(torch_dtype(model.dtype), model.attn_implementation)

    def collate(self, examples: Any, places: list[int]) -> dict[str, Tensor]:
        """Return some images as one batch."""
        return default_data_collator([examples[place] for place in places])

    def make_trainer(
        self, model: nn.Module, adapter_config: PeftConfig | None, **options: Any
    ) -> "ImageTrainer":
        """Return the trainer."""
        options["args"].label_names = ["labels"]
        model = make_trainable(model, adapter_config, self.config.method)
        return ImageTrainer(model=model, **options)

    def results(self, trainer: Any, items_per_second: float) -> dict[str, Any]:
        """Return loss, accuracies and mistakes, images per second, and what model and data are."""
        curve, classes = curve_of(trainer.state.log_history, "eval_accuracy"), self.base.classes
        more: dict[str, Any] = {
            "accuracy_before": curve[0][1] if curve else None,
            "eval_accuracies": curve,
            "images_per_second": items_per_second,
            "head": "own" if self.base.has_own_head else "new",
            "classes": classes,
            "image_size": self.base.size,
            "accuracy_after": None,
            "confusion": [],
            "mistakes": [],
        }
        found: dict[str, Any] = {}
        if self.evaluation is not None:
            scored = trainer.predict(self.evaluation)
            found["eval_loss_after"] = float(scored.metrics["test_loss"])
            more["accuracy_after"] = float(scored.metrics["test_accuracy"])
            more |= pictures.compare(scored.predictions, scored.label_ids, self.evaluation)
        sizes = [sum(row) for row in more["confusion"]]
        largest = f" (always the largest class: {max(sizes) / sum(sizes):.4f})" if sizes else ""
        return found | {
            "rows": [
                ("held-out accuracy before", four_digits(more["accuracy_before"])),
                ("held-out accuracy after", four_digits(more["accuracy_after"]) + largest),
                ("images per second", f"{items_per_second:,.1f}"),
            ],
            "details": pictures.describe(classes, more["confusion"]),
            "more": more,
        }

    def write(self, report: Any, folder: Path) -> None:
        """Write the transform, the classes beside an adapter, and the pictures."""
        self.base.processor.save_pretrained(folder)
        if METHODS[self.config.method].has_adapter:
            sidecar = json.dumps({"classes": self.base.classes}, indent=2, ensure_ascii=False)
            (folder / SIDECAR_NAME).write_text(sidecar + "\n", encoding="utf-8")
        if self.evaluation is not None:
            pictures.draw_confusion(report.more["confusion"], self.evaluation.classes, folder)
            pictures.draw_mistakes(report.more["mistakes"], self.evaluation, folder)

    def how_to_load(self, report: Any) -> str:
        """Return the classes, and code that classifies an image."""
        classes = self.base.classes
        names = ", ".join(classes[:20]) + (", ..." if len(classes) > 20 else "")
        merging = "`classifier.model.merge_and_unload()` makes the PEFT model a plain one."
        return (
            f"Tells apart {len(classes)} classes: {names}.\n\n"
            f"Install pacatune ({install_command('vision')}), then:\n\n"
            "```python\nfrom pacatune.training.image import load_result\n\n"
            'classifier = load_result("FOLDER")\n'
            'print(classifier.classify("IMAGE.png"))  # class -> probability\n```\n'
        ) + (f"\n{merging}\n" if METHODS[self.config.method].has_adapter else "")


class _NewPass(TrainerCallback):
    """Tells images the number of the pass, in which they are augmented anew."""

    def __init__(self, images: ImageDataset) -> None:
        self._images = images

    def on_epoch_begin(self, args: Any, state: Any, *_: Any, **__: Any) -> None:
        self._images.epoch.fill_(int(state.epoch or 0))  # which also counts its steps


class ImageTrainer(RunTrainer):
    """Trainer of a model that turns `pixel_values` into `logits`."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(compute_loss_func=self._loss, compute_metrics=_measure, **kwargs)
        self.add_callback(_NewPass(self.train_dataset))
        # The loss is ours, so nothing but pixels goes into the model.
        self.model_accepts_loss_kwargs = False

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        """Compute the loss; in training, of mixed images, with BatchNorm as it was pretrained."""
        if model.training and self.args.mixup_alpha:
            mixer = v2.MixUp(alpha=self.args.mixup_alpha, num_classes=self.model.config.num_labels)
            # In this order: torchvision takes the first tensor for the images, whatever its key.
            pixels, labels = mixer(inputs["pixel_values"], inputs["labels"])
            inputs = {"pixel_values": pixels, "labels": labels}
        if not self.args.train_batch_norm:
            for layer in find_batch_norms(self.model).values():
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
