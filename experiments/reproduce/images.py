"""Tables 6 and 7: ViT-B/16 and EfficientNetV2-L on images, by the functions of examples/images.py.

A real small model is trained on CIFAR-10, and steps of the paper's own models are measured with
random weights. The paper gives no settings for images.
"""

import copy
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from benchmarks.timing import alternate, ratio_row
from examples.images import MODELS, adapt, load_images, make_trainer
from examples.packaged import prepare
from experiments.paper import PAPER, Line, Printed
from experiments.reproduce.costs import RANK
from experiments.reproduce.experiment import Experiment
from experiments.reproduce.runs import Work, rate_note, row_of
from pacatune.measure.counters import SavedBytes
from pacatune.reports.provenance import num_cores
from pacatune.reports.rows import Job, Row, spread_of_mean

_NUM_VALIDATION, _NUM_TEST, _SEEDS = 200, 500, (0, 1)
_NUM_CLASSES = 100
_SECONDS = 30.0
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


def _make_step(model: nn.Module, batch: dict[str, Tensor]) -> Callable[[], float]:
    """Return what makes a step of a model on a batch, and returns its seconds."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)

    def step() -> float:
        start = time.perf_counter()
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return time.perf_counter() - start

    return step


@dataclass(frozen=True, kw_only=True)
class _Images:
    """What distinguishes Table 6 from Table 7."""

    table: Printed
    learning_rates: dict[str, list[float]]
    """Method -> grid."""
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

    def experiment(self, about: str, *notes: str) -> Experiment:
        """Return the experiment."""
        small = (
            f"Here {self.small_model} is trained for {self.num_steps} steps on "
            f"CIFAR-10's test images, and scored on {_NUM_TEST} others of them, which "
            "is not the usual accuracy on CIFAR-10; the learning rate is the best of three on "
            f"validation images. Steps are of {self.model} with random weights."
        )
        return Experiment(
            paper=self.table,
            about=f"{about} {small}",
            beside=self.table.lines[0].model,
            jobs=self._jobs,
            notes=notes,
        )

    def _jobs(self) -> list[Job]:
        return [self._steps_job(), *map(self._small_job, self.table.lines)]

    def _small_job(self, line: Line) -> Job:
        rates = self.learning_rates[line.method]
        sizes = {"rank": RANK, "num_validation": _NUM_VALIDATION, "num_test": _NUM_TEST}
        return Job(
            key=f"small-{line.key}",
            title=f"{self.small_model} on CIFAR-10: {line.title}",
            inputs={
                "model": self.example,
                "method": line.method,
                "learning_rates": rates,
                "steps": self.num_steps,
                "seeds": [*_SEEDS],
                **sizes,
            },
            run=partial(self._train, line, rates),
        )

    def _train(self, line: Line, rates: list[float], folder: Path) -> list[Row]:
        """Score on test images at the rate that is best on validation images with one seed."""
        name, size = MODELS[self.example]
        path, (rest, test) = str(prepare(name)), load_images(prepare("cifar10"))
        split = rest.train_test_split(_NUM_VALIDATION, stratify_by_column="label", seed=0)
        held_out = type(split)(
            validation=split["test"],
            test=test.train_test_split(_NUM_TEST, stratify_by_column="label", seed=0)["test"],
        )

        def score(rate: float, seed: int) -> dict[str, float]:
            how = (folder, RANK, rate, self.num_steps)
            images = split["train"], held_out
            with Work(folder).quiet("training"):
                trainer = make_trainer(path, line.method, images, *how, seed=seed, size=size)
                trainer.train()
                found: dict[str, float] = trainer.evaluate()
            return found

        first, *others = _SEEDS
        tried = {rate: score(rate, first) for rate in rates}
        best = max(rates, key=lambda rate: tried[rate]["eval_validation_accuracy"])
        scores = {first: tried[best], **{seed: score(best, seed) for seed in others}}
        each = {str(seed): 100 * found["eval_test_accuracy"] for seed, found in scores.items()}
        mean, spread = statistics.mean(each.values()), spread_of_mean([*each.values()])
        return [
            row_of(
                self.table,
                line,
                "CIFAR-10",
                mean,
                low=mean - spread,
                high=mean + spread,
                n=len(each),
                each=each,
                note=rate_note(line, best, rates),
                model=self.small_model,
                setting=_ADAPTERS,
            )
        ]

    def _steps_job(self) -> Job:
        """Return the job that measures time and kept bytes of the paper's own model."""
        methods = ["paca", *(m for m in self.learning_rates if m != "paca")]
        sizes = {"rank": RANK, "num_images": self.num_images, "image_size": self.image_size}
        return Job(
            key="steps",
            title=f"measuring steps of {self.model} with random weights",
            inputs={"model": self.model, "methods": methods, **sizes, "seconds": _SECONDS},
            run=lambda folder: self._measure(methods),
        )

    def _measure(self, methods: list[str]) -> list[Row]:
        """Let methods, ours first, take turns at steps in float32; count what they keep."""
        torch.set_num_threads(num_cores())
        torch.manual_seed(0)
        base = self.build()
        images = torch.randn(self.num_images, 3, self.image_size, self.image_size)
        labels = torch.randint(_NUM_CLASSES, (self.num_images,))
        batch = {"pixel_values": images, "labels": labels}
        names = {"model": f"{self.model}, random weights"}
        how = f"{self.num_images} images of {self.image_size} px, {_ADAPTERS}"
        titles = {line.method: line.title for line in self.table.lines}
        steps, rows = {}, []
        for method in methods:
            model, _ = adapt(copy.deepcopy(base), method, RANK)
            steps[method] = _make_step(model.train(), batch)
            with SavedBytes(model) as saved:
                loss = model(**batch).loss
            del loss
            rows.append(
                Row(
                    what="memory",
                    method=titles[method],
                    value=saved.num_bytes,
                    unit="bytes",
                    setting=f"kept for backward, {how}",
                    origin="counted",
                    **names,
                )
            )
        times = alternate(steps, seconds=_SECONDS, min_rounds=5, num_warmup=1)
        ours, *others = methods
        for other in others:
            both, title = (times[ours], times[other]), f"{titles[ours]} / {titles[other]}"
            names |= {"what": "training time", "setting": f"a step, {how}"}
            rows.append(ratio_row(*both, seed=0, method=title, **names))
        return rows


TABLE_6_EXPERIMENT = _Images(
    table=PAPER["table6"],
    learning_rates={"lora": [1e-3, 3e-3, 9e-3], "paca": [1e-3, 3e-3, 9e-3]},
    example="dinov2-small",
    small_model="DINOv2-S",
    num_steps=30,
    build=build_vit,
    model="ViT-B/16",
    num_images=4,
    image_size=224,
).experiment(
    "The paper fine-tunes ViT-B/16, a transformer for images, on four data sets, by LoRA and by "
    "PaCA, to show that PaCA is not for language alone.",
    "DINOv2-S has 22 M parameters and was fine-tuned for saliency by others.",
    "CIFAR-100, Oxford-IIIT Pets and Oxford-Flowers 102 cannot be had offline, so their columns "
    "have no counterpart.",
)
TABLE_7_EXPERIMENT = _Images(
    table=PAPER["table7"],
    learning_rates={"full": [3e-4, 1e-3, 3e-3], "paca": [2e-3, 6e-3, 1.8e-2]},
    example="efficientnet-lite0",
    small_model="EfficientNet-Lite0",
    num_steps=40,
    build=build_efficientnet,
    model="EfficientNetV2-L",
    num_images=2,
    image_size=192,
).experiment(
    "LoRA's matrices are linear layers and do not merge into every kind of convolution; PaCA "
    "trains some input channels of any. The paper fine-tunes EfficientNetV2-L, a convolutional "
    "network, in full and by PaCA.",
    "EfficientNet-Lite0 has 3.4 M parameters, and weights of ImageNet.",
    "CIFAR-100 cannot be had offline, so its column has no counterpart.",
    "The paper trained BatchNorm in a way that it does not state; here it stays in evaluation "
    "mode.",
)
