"""Tables 6 and 7: ViT-B/16 and EfficientNetV2-L on images, by the functions of examples/images.py.

A real small model is trained on CIFAR-10, and steps of the paper's own models are measured with
random weights. The paper gives no settings for images.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from benchmarks.results import mean_row
from benchmarks.timing import Contender, Step
from examples.images import MODELS, adapt, load_images, make_trainer
from examples.packaged import prepare
from experiments.jobs import Job
from experiments.paper import PAPER, Line, Printed
from experiments.reproduce.costs import RANK, as_costs, measured
from experiments.reproduce.runs import at_best_rate, quiet, rate_note
from pacatune.reports.provenance import num_cores
from pacatune.reports.rows import Row

_NUM_VALIDATION, _NUM_TEST, _SEEDS = 200, 500, (0, 1)
_NUM_CLASSES = 100
# Full fine-tuning, which has none, stands under the same setting.
_ADAPTERS = f"adapters of rank {RANK}"


def build_vit() -> nn.Module:
    """Return ViT-B/16 with random weights."""
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(num_labels=_NUM_CLASSES)
    return ViTForImageClassification._from_config(config, attn_implementation="sdpa")  # type: ignore[no-any-return]


def build_efficientnet() -> nn.Module:
    """Return EfficientNetV2-L with random weights, and the statistics of random images.

    Without them values would vanish in depth.
    """
    from transformers import TimmWrapperConfig, TimmWrapperForImageClassification

    values = {"architecture": "tf_efficientnetv2_l", "num_classes": _NUM_CLASSES}
    model = TimmWrapperForImageClassification(TimmWrapperConfig.from_dict(values)).train()
    for layer in model.modules():
        if isinstance(layer, _BatchNorm):
            layer.momentum = 1.0  # they become those of the one batch
    with torch.no_grad():
        model(pixel_values=torch.randn(4, 3, 128, 128))
    return model


@dataclass(frozen=True, kw_only=True)
class _Images:
    """What distinguishes Table 6 from Table 7."""

    table: Printed
    learning_rates: dict[str, list[float]]
    """Method -> grid; ours first."""
    example: str
    """Name of the small model in the example."""
    small_model: str
    num_steps: int
    """That the small model is trained for, 32 images each."""
    build: Callable[[], nn.Module]
    """The paper's model with random weights."""
    model: str
    num_images: int
    image_size: int
    """Pixels of the images in the steps that are timed."""

    def jobs(self) -> list[Job]:
        """Return the steps of the paper's model, and the training of the small one."""
        return [self._steps_job(), *map(self._small_job, self.table.lines)]

    def _small_job(self, line: Line) -> Job:
        rates = self.learning_rates[line.method]
        inputs = {"model": self.example, "method": line.method, "learning_rates": rates}
        inputs |= {"steps": self.num_steps, "seeds": [*_SEEDS], "rank": RANK}
        inputs |= {"num_validation": _NUM_VALIDATION, "num_test": _NUM_TEST}
        title = f"{self.small_model} on CIFAR-10: {line.title}"
        run = partial(self._train, line, rates)
        return Job(key=f"small-{line.key}", title=title, inputs=inputs, run=run)

    def _train(self, line: Line, rates: list[float], folder: Path) -> list[Row]:
        """Score on test images at the rate that is best on validation images with one seed."""
        name, size = MODELS[self.example]
        path, (rest, test) = str(prepare(name)), load_images(prepare("cifar10"))
        split = rest.train_test_split(_NUM_VALIDATION, stratify_by_column="label", seed=0)
        held_out = type(split)(
            validation=split["test"],
            test=test.train_test_split(_NUM_TEST, stratify_by_column="label", seed=0)["test"],
        )

        def scores(rate: float, seed: int) -> dict[str, float]:
            how = (folder, RANK, rate, self.num_steps)
            images = split["train"], held_out
            with quiet(folder):
                trainer = make_trainer(path, line.method, images, *how, seed=seed, size=size)
                trainer.train()
                reached: dict[str, float] = trainer.evaluate()
            return reached

        best, of_seeds = at_best_rate(
            rates, _SEEDS, scores, lambda reached: -reached["eval_validation_accuracy"]
        )
        each = {
            str(seed): 100 * reached["eval_test_accuracy"]
            for seed, reached in zip(_SEEDS, of_seeds, strict=True)
        }
        names = {"unit": "%", "model": self.small_model, "setting": _ADAPTERS}
        return [mean_row("CIFAR-10", line.title, each, rate_note(line, best, rates), **names)]

    def _steps_job(self) -> Job:
        """Return the job that measures time and kept bytes of the paper's own model."""
        inputs: dict[str, Any] = {"model": self.model, "methods": [*self.learning_rates]}
        inputs |= {"rank": RANK, "num_images": self.num_images, "image_size": self.image_size}
        title = f"measuring steps of {self.model} with random weights"
        return Job(key="steps", title=title, inputs=inputs, run=self._measure)

    def _measure(self, folder: Path) -> list[Row]:
        """Let methods take turns at steps in float32; count what they keep."""
        torch.set_num_threads(num_cores())
        torch.manual_seed(0)
        base = self.build()
        images = torch.randn(self.num_images, 3, self.image_size, self.image_size)
        labels = torch.randint(_NUM_CLASSES, (self.num_images,))
        batch = {"pixel_values": images, "labels": labels}
        steps = {}
        for method in self.learning_rates:
            model, _ = adapt(copy.deepcopy(base), method, RANK)
            trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
            optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)
            contender = Contender(method, model.train(), optimizer)
            steps[method] = Step(contender=contender, batch=batch, loss=_loss)
        titles = {line.method: line.title for line in self.table.lines}
        how = f"{self.num_images} images of {self.image_size} px, {_ADAPTERS}"
        return as_costs(measured(steps, f"{self.model}, random weights"), titles, how)


def _loss(model: Any, batch: dict[str, Tensor]) -> Tensor:
    loss: Tensor = model(**batch).loss
    return loss


TABLE_6 = _Images(
    table=PAPER["table6"],
    learning_rates={"paca": [1e-3, 3e-3, 9e-3], "lora": [1e-3, 3e-3, 9e-3]},
    example="dinov2-small",
    small_model="DINOv2-S",
    num_steps=30,
    build=build_vit,
    model="ViT-B/16",
    num_images=4,
    image_size=224,
)
TABLE_7 = _Images(
    table=PAPER["table7"],
    learning_rates={"paca": [2e-3, 6e-3, 1.8e-2], "full": [3e-4, 1e-3, 3e-3]},
    example="efficientnet-lite0",
    small_model="EfficientNet-Lite0",
    num_steps=40,
    build=build_efficientnet,
    model="EfficientNetV2-L",
    num_images=2,
    image_size=192,
)
