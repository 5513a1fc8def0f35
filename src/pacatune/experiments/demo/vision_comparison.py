"""The image demo's runs: head alone, LoRA, and PaCA with as many trained parameters as LoRA."""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pacatune.data.packaged import prepare_dino, prepare_efficientnet

if TYPE_CHECKING:
    from pacatune.training.image import ImageDataConfig, ImageRunConfig

BATCH_SIZE = 32
RANK = 8


@dataclass(frozen=True, kw_only=True)
class DemoModel:
    """A real model of the demo."""

    title: str
    prepare: Callable[..., Path]
    image_size: int
    learning_rates: dict[str, float]
    """By method: that with the best held-out accuracy of a few, from 1e-3 to 1e-2, in 40 steps
    with seed 0; for the head of DINOv2-S up to 3e-2. Chosen with less warming up, but for LoRA and
    PaCA on DINOv2-S: the best of 3e-3 and 5e-3 (PaCA also 2e-3)."""


MODELS = {
    "efficientnet-lite0": DemoModel(
        title="EfficientNet-Lite0, ImageNet weights (3.4 M parameters)",
        prepare=prepare_efficientnet,
        image_size=96,
        learning_rates={"head": 3e-3, "lora": 3e-3, "paca": 3e-3},
    ),
    "dinov2-small": DemoModel(
        title="DINOv2-S, fine-tuned for saliency by others (22 M parameters)",
        prepare=prepare_dino,
        image_size=98,
        learning_rates={"head": 1e-2, "lora": 3e-3, "paca": 3e-3},
    ),
}


def make_runs(
    model: str,
    data: "ImageDataConfig",
    folder: Path,
    learning_rates: Mapping[str, float | None],
    *,
    num_steps: int,
    seed: int,
) -> "dict[str, ImageRunConfig]":
    """Return the three runs, by method, in the order in which they are done.

    Args:
        model: Folder or hub id.
        data: Data of all runs.
        folder: Gets one folder per method.
        learning_rates: Rate of each method; None for its default.
        num_steps: Optimizer steps of each run.
        seed: Seed for the order of the images, the head, the columns and the start of LoRA.
    """
    from pacatune.training.image import ImageModelConfig, ImageRunConfig, ImageTrainingConfig

    runs = {}
    for method in ("head", "lora", "paca"):
        training = ImageTrainingConfig(
            output_dir=str(folder / method),
            max_steps=num_steps,
            per_device_train_batch_size=BATCH_SIZE,
            # Of so few: until the new head has learnt something, its gradients are noise.
            warmup_steps=num_steps // 5,
            learning_rate=learning_rates[method],
            eval_strategy="no",  # before and after are evaluated all the same
            save_strategy="no",
            report_to="none",
            seed=seed,
        )
        runs[method] = ImageRunConfig(
            method=method,
            model=ImageModelConfig(path=model),
            data=data,
            training=training,
        )
    runs["paca"].paca.r = runs["paca"].paca.paca_alpha = RANK
    runs["paca"].paca.random_seed = seed
    rank = _equal_rank(runs["paca"], runs["lora"])
    runs["lora"].lora.r = runs["lora"].lora.lora_alpha = rank
    return runs


def _equal_rank(paca: "ImageRunConfig", lora: "ImageRunConfig") -> int:
    """Return the rank at which LoRA trains as many parameters as PaCA, or nearly."""
    from pacatune.training.task import task_of

    single, head = copy.deepcopy(lora), copy.deepcopy(lora)
    single.lora.r, head.method = 1, "head"
    runs = (paca, single, head)
    numbers = [task_of(config).plan().num_trainable_parameters for config in runs]
    return max(1, round((numbers[0] - numbers[2]) / (numbers[1] - numbers[2])))
