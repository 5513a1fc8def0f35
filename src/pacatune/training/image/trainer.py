"""The trainer of image classifiers: BatchNorm as configured, mixup, accuracy."""

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import EvalLoopOutput

from pacatune.training.checkpoints import RunTrainer
from pacatune.training.image.parts import find_batch_norms


class ImageTrainer(RunTrainer, Trainer):  # type: ignore[misc]
    """Trainer of a model that turns `pixel_values` into `logits`.

    Args:
        num_classes: Number of classes.
        forward_options: What the model's forward needs besides pixels.
        kwargs: As for RunTrainer and Trainer.
    """

    def __init__(self, *, num_classes: int, forward_options: dict[str, Any], **kwargs: Any) -> None:
        super().__init__(compute_loss_func=self._loss, compute_metrics=compute_metrics, **kwargs)
        # The loss is ours, so nothing but pixels goes into the model.
        self.model_accepts_loss_kwargs = False
        self._num_classes = num_classes
        self._forward_options = forward_options
        self._batch_norms = find_batch_norms(self.model)

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Tensor:
        """Take one micro-batch forward and backward, counting its images."""
        self._meter.add(len(inputs["labels"]))
        if self.args.mixup_alpha > 0:
            inputs = {**inputs, **mix(inputs, self.args.mixup_alpha, self._num_classes)}
        loss: Tensor = super().training_step(model, inputs, *args, **kwargs)
        return loss

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        """Compute the loss; Trainer has put all of the model into training mode before."""
        if not self.args.train_batch_norm:
            for layer in self._batch_norms.values():
                layer.eval()
        inputs = {**inputs, **self._forward_options}
        return super().compute_loss(model, inputs, *args, **kwargs)

    def evaluation_loop(
        self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any
    ) -> EvalLoopOutput:
        """Evaluate; the loss is a mean over images, which Trainer's is not in several processes."""
        result = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        logits, labels = (torch.from_numpy(a) for a in (result.predictions, result.label_ids))
        result.metrics[f"{metric_key_prefix}_loss"] = float(F.cross_entropy(logits, labels))
        return result

    def _loss(
        self, outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Return the cross-entropy; smoothed in training only, so that losses can be compared."""
        logits = outputs["logits"].float()
        smoothing = self.args.label_smoothing_factor if logits.requires_grad else 0.0
        total = F.cross_entropy(logits, labels, reduction="sum", label_smoothing=smoothing)
        return total / (len(logits) if num_items_in_batch is None else num_items_in_batch)


class NewEpoch(TrainerCallback):  # type: ignore[misc]
    """Tells the training images the number of the pass, for other augmentations each time.

    Args:
        dataset: Has the attribute `epoch`.
    """

    def __init__(self, dataset: Any) -> None:
        self._dataset = dataset

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Before the first batch is loaded; `state.epoch` also counts the steps of this one."""
        self._dataset.epoch = int(state.epoch or 0)


def mix(inputs: dict[str, Any], alpha: float, num_classes: int) -> dict[str, Tensor]:
    """Mix each image and its class with another's, all in one share from Beta(alpha, alpha).

    Args:
        inputs: `pixel_values` (B, 3, H, W) and `labels` (B,).
        alpha: Above 0.
        num_classes: C.

    Returns:
        `pixel_values` (B, 3, H, W) and `labels` (B, C), the shares of the classes.

    Source: mixup, Zhang et al. 2018, Eq. 1.
    """
    pixels, labels = inputs["pixel_values"], inputs["labels"]
    share = float(torch.distributions.Beta(alpha, alpha).sample())
    partners = torch.randperm(len(pixels)).to(pixels.device)
    classes = F.one_hot(labels, num_classes).to(pixels.dtype)
    return {
        "pixel_values": torch.lerp(pixels[partners], pixels, share),
        "labels": torch.lerp(classes[partners], classes, share),
    }


def compute_metrics(prediction: Any) -> dict[str, float]:
    """Return the accuracy of logits (N, C) against labels (N,)."""
    correct = np.argmax(prediction.predictions, axis=-1) == prediction.label_ids
    return {"accuracy": float(correct.mean())}
