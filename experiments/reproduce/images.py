"""Tables 6 and 7: ViT-B/16 and EfficientNetV2-L on images.

At the small scale a real small model is trained on CIFAR-10, and steps of the paper's own are
measured with random weights; at the full scale they are the presets of `pacatune train-image`.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from benchmarks.methods import adapt
from benchmarks.timing import Step, alternate, ratio_row
from examples.packaged import default_cache
from experiments.paper import Line, Table
from experiments.paper.tables import TABLE_6, TABLE_7
from experiments.reproduce.costs import RANK
from experiments.reproduce.experiment import Experiment, Scale, of_table
from experiments.reproduce.runs import Work, arm_row, cost_rows, row_of, study_job
from pacatune.measure.counters import SavedBytes
from pacatune.methods import METHODS
from pacatune.reports.provenance import num_cores
from pacatune.reports.rows import Job, Row
from pacatune.training import RunConfig
from pacatune.training.config_file import to_values
from pacatune.training.image.model import choose_targets
from pacatune.training.task import find_heads

_EVAL_PER_CLASS = 50
_NUM_CLASSES = 100
_SECONDS = 30.0
# Full fine-tuning, which has none, stands under the same setting.
_ADAPTERS = f"adapters of rank {RANK}"


def build_vit(**sizes: Any) -> nn.Module:
    """Return ViT-B/16, unless sizes are given, with random weights."""
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(num_labels=_NUM_CLASSES, **sizes)
    return ViTForImageClassification._from_config(config, attn_implementation="sdpa")  # type: ignore[no-any-return]


def build_efficientnet(architecture: str = "tf_efficientnetv2_l") -> nn.Module:
    """Return EfficientNetV2-L, unless another architecture of timm is given."""
    from transformers import AutoModelForImageClassification, TimmWrapperConfig

    values = {"architecture": architecture, "num_classes": _NUM_CLASSES}
    return AutoModelForImageClassification.from_config(TimmWrapperConfig.from_dict(values))  # type: ignore[no-any-return]


def _with_statistics(model: nn.Module) -> nn.Module:
    """Give BatchNorm the statistics of random images, or values would vanish in depth."""
    norms = [layer for layer in model.modules() if isinstance(layer, _BatchNorm)]
    momenta = [layer.momentum for layer in norms]
    for layer in norms:
        layer.momentum = None  # the plain mean over batches, of which there is one
    if norms:
        with torch.no_grad():
            model.train()(pixel_values=torch.randn(4, 3, 128, 128))
    for layer, momentum in zip(norms, momenta, strict=True):
        layer.momentum = momentum
    return model


def _make_step(base: nn.Module, method: str, batch: tuple[Tensor, Tensor]) -> Step:
    """Return a step of what `train-image` makes of a model; BatchNorm is in evaluation mode."""
    heads, row = find_heads(base), METHODS[method]
    targets: Any = choose_targets(base, row, RANK)[0] if row.has_adapter else ""
    contender = adapt(copy.deepcopy(base), method, rank=RANK, seed=0, targets=targets, heads=heads)
    for layer in contender.model.modules():
        if isinstance(layer, _BatchNorm):
            layer.eval()
    return Step(contender=contender, batch=batch, loss=_loss)


def _loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    images, labels = batch
    return F.cross_entropy(model(pixel_values=images).logits.float(), labels)


@dataclass(frozen=True, kw_only=True)
class _Images:
    """What distinguishes Table 6 from Table 7."""

    table: Table
    task: str
    """Name of its packaged configuration."""
    learning_rates: dict[str, list[float]]
    """Method -> grid."""
    small_model: str
    num_steps: int
    """That the small model is trained for, 32 images each."""
    build: Callable[[], nn.Module]
    """The paper's model with random weights."""
    model: str
    num_images: int
    image_size: int
    """Pixels of the images in the steps that are timed."""
    presets: dict[str, str]
    """Key of a score -> preset of `train-image`."""

    def experiment(self, about: str, *notes: str) -> Experiment:
        """Return the experiment."""
        small = (
            f"At the small scale {self.small_model} is trained for {self.num_steps} steps on "
            f"CIFAR-10's test images, and scored on {10 * _EVAL_PER_CLASS} others of them, which "
            "is not the usual accuracy on CIFAR-10; the learning rate is the best of three on "
            f"validation images. Steps are of {self.model} with random weights."
        )
        return of_table(
            self.table,
            about=f"{about} {small}",
            beside=self.table.lines[0].model,
            jobs=self._jobs,
            notes=notes,
        )

    def _jobs(self, scale: Scale) -> list[Job]:
        lines = self.table.lines
        if scale == "full":
            presets = self.presets.items()
            return [self._full_job(line, key, name) for line in lines for key, name in presets]
        return [self._steps_job(), *(self._small_job(line) for line in lines)]

    def _small_job(self, line: Line) -> Job:
        rates = self.learning_rates[line.method]

        def read(found: Any) -> list[Row]:
            how = {"model": self.small_model, "setting": _ADAPTERS}
            return [arm_row(self.table, line, "cifar10", found, rates, factor=100, **how)]

        rank = RANK if line.method != "full" else None
        images = default_cache() / "cifar10-test-images"
        data = {"path": str(images / "train"), "eval_path": str(images / "test")}
        return study_job(
            line,
            f"{self.small_model} on CIFAR-10: {line.title}",
            self.task,
            read,
            {"rank": rank, "learning_rates": rates},
            command="train-image",
            options={
                "data": {**data, "eval_per_class": _EVAL_PER_CLASS, "check_images": False},
                "training": {"max_steps": self.num_steps, "warmup_steps": self.num_steps // 5},
            },
            seeds=[0, 1],
        )

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
        base = _with_statistics(self.build())
        images = torch.randn(self.num_images, 3, self.image_size, self.image_size)
        batch = (images, torch.randint(_NUM_CLASSES, (self.num_images,)))
        names = {"model": f"{self.model}, random weights"}
        how = f"{self.num_images} images of {self.image_size} px, {_ADAPTERS}"
        titles = {line.method: line.title for line in self.table.lines}
        steps, rows = {}, []
        for method in methods:
            steps[method] = step = _make_step(base, method, batch)
            with SavedBytes(step.contender.model) as saved:
                loss = step.forward()
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
        runs: Any = {method: step.seconds for method, step in steps.items()}
        times = alternate(runs, seconds=_SECONDS, min_rounds=5, num_warmup=1)
        ours, *others = methods
        for other in others:
            both, title = (times[ours], times[other]), f"{titles[ours]} / {titles[other]}"
            names |= {"what": "training time", "setting": f"a step, {how}"}
            rows.append(ratio_row(*both, seed=0, method=title, **names))
        return rows

    def _full_job(self, line: Line, key: str, preset: str) -> Job:
        """Return the job of a preset; memory and time are of CIFAR-10: the paper does not say."""
        run = full_run(line, preset)
        return Job(
            key=f"full-{line.key}-{key}",
            title=f"pacatune train-image --preset {preset} --method {line.method}",
            inputs={"line": line.key, "run": to_values(run.settled())},
            run=partial(self._run_full, line, key, run),
        )

    def _run_full(self, line: Line, key: str, run: RunConfig, folder: Path) -> list[Row]:
        report, _ = Work(folder).train(run, "run")
        rows = [row_of(self.table, line, key, 100 * report["accuracy_after"])]
        return [*rows, *(cost_rows(self.table, line, report) if key == "cifar10" else [])]


def full_run(line: Line, preset: str) -> RunConfig:
    """Return the run of a line by a preset of `train-image`."""
    from pacatune.training.image.config import find_preset

    options: dict[str, Any] = {"model": {}, "data": {}, "training": {"report_to": "none"}}
    for name, value in find_preset(preset).items():
        section, _, key = name.partition(".")
        options[section][key] = value
    return RunConfig(task="image", method=line.method, **options)


TABLE_6_EXPERIMENT = _Images(
    table=TABLE_6,
    task="dinov2-cifar10",
    learning_rates={"lora": [1e-3, 3e-3, 9e-3], "paca": [1e-3, 3e-3, 9e-3]},
    small_model="DINOv2-S",
    num_steps=30,
    build=build_vit,
    model="ViT-B/16",
    num_images=4,
    image_size=224,
    presets={name: f"vit-b16-{name}" for name in ("cifar10", "cifar100", "pets", "flowers102")},
).experiment(
    "The paper fine-tunes ViT-B/16, a transformer for images, on four data sets, by LoRA and by "
    "PaCA, to show that PaCA is not for language alone.",
    "DINOv2-S has 22 M parameters and was fine-tuned for saliency by others.",
    "CIFAR-100, Oxford-IIIT Pets and Oxford-Flowers 102 cannot be had offline, so their columns "
    "have no counterpart at the small scale.",
)
TABLE_7_EXPERIMENT = _Images(
    table=TABLE_7,
    task="efficientnet-cifar10",
    learning_rates={"full": [3e-4, 1e-3, 3e-3], "paca": [2e-3, 6e-3, 1.8e-2]},
    small_model="EfficientNet-Lite0",
    num_steps=40,
    build=build_efficientnet,
    model="EfficientNetV2-L",
    num_images=2,
    image_size=192,
    presets={name: f"efficientnetv2-l-{name}" for name in ("cifar10", "cifar100")},
).experiment(
    "LoRA's matrices are linear layers and do not merge into every kind of convolution; PaCA "
    "trains some input channels of any. The paper fine-tunes EfficientNetV2-L, a convolutional "
    "network, in full and by PaCA.",
    "EfficientNet-Lite0 has 3.4 M parameters, and weights of ImageNet.",
    "CIFAR-100 cannot be had offline, so its column has no counterpart at the small scale.",
    "The paper trained BatchNorm in a way that it does not state; here it stays in evaluation "
    "mode.",
)
