"""Tables 6 and 7: ViT-B/16 and EfficientNetV2-L on images.

At the small scale a real small model is trained, and steps of the paper's own are measured with
random weights; at the full scale they are the presets of `pacatune train-image`.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pacatune.experiments.reproduce.comparison import Source, table_experiment
from pacatune.experiments.reproduce.experiment import (
    Cell,
    Experiment,
    Measured,
    Mode,
    Result,
    Results,
    Scale,
)
from pacatune.experiments.reproduce.image_steps import build_efficientnet, build_vit, measure_steps
from pacatune.experiments.reproduce.runs import SPREAD_NOTE, Runs, Tell, scores_source, study_cell
from pacatune.experiments.reproduce.settings import SettingsBeside
from pacatune.experiments.reproduce.steps import RANK, small_rank, steps_of_ours
from pacatune.experiments.reproduce.verdicts import Column, Numbers, same_column
from pacatune.paper.settings import Settings
from pacatune.paper.tables import TABLE_6, TABLE_7, Quantity, Row, Table
from pacatune.study import Arm

_EVAL_PER_CLASS = 50
_NUM_EXAMPLES = 10 * _EVAL_PER_CLASS
_MB = 10**6
_CANNOT = (
    "`pacatune estimate` runs the steps of causal language models only, so the memory of image "
    "models cannot be simulated; --scale small counts what they keep for the backward pass."
)


@dataclass(frozen=True, kw_only=True)
class _Images:
    """What distinguishes Table 6 from Table 7."""

    table: Table
    task: str
    """Name of its packaged configuration."""
    learning_rates: dict[str, list[float]]
    """Method -> grid."""
    small_model: str
    """What it is, for the reader."""
    num_steps: int
    """That it is trained for."""
    build: Callable[[], Any]
    """The paper's model with random weights."""
    model: str
    """Its name."""
    num_images: int
    image_size: int
    """Pixels of the images in the steps that are timed."""
    presets: dict[str, str]
    """Key of a score -> preset of `train-image`."""

    def experiment(self, about: str, *notes: str) -> Experiment:
        """Return the experiment."""
        return table_experiment(
            self.table,
            [about],
            self._sources,
            self._settings,
            notes=notes,
            cannot={"simulate": _CANNOT},
        )

    def _sources(self, mode: Mode) -> list[Source]:
        if mode == "full":
            return [self._full_source()]
        model, rows = self.small_model.partition(" (")[0], self.table.rows
        score = Column(
            quantity=Quantity(
                "small_accuracy", "accuracy of a small model on CIFAR-10", "%", "score", 1.0
            ),
            paper=self.table.quantity("cifar10"),
            model=model,
            rank=small_rank,
            about=f"{self.small_model}, {self.num_steps} steps of 32 images out of CIFAR-10's test "
            f"images, scored on {_NUM_EXAMPLES} others of them: not the usual accuracy on "
            "CIFAR-10. For each method the best of three learning rates on validation images. "
            f"{SPREAD_NOTE}",
        )
        return [
            self._steps_source(),
            scores_source(rows, self._small_cell, score, _NUM_EXAMPLES),
        ]

    def _small_cell(self, row: Row) -> Cell:
        return study_cell(
            row,
            f"{self.small_model} by {row.method} on CIFAR-10",
            self.task,
            Arm(
                method=row.method,
                rank=small_rank(row),
                learning_rates=self.learning_rates[row.method],
            ),
            command="train-image",
            options={
                "data": {"eval_per_class": _EVAL_PER_CLASS},
                "training": {"max_steps": self.num_steps, "warmup_steps": self.num_steps // 5},
            },
            seeds=[0, 1],
        )

    def _steps_source(self) -> Source:
        """Return time and kept bytes of steps of the paper's model with random weights."""
        methods = ["paca", *(m for m in self.table.methods() if m != "paca")]
        sizes: dict[str, Any] = {
            "rank": RANK,
            "num_images": self.num_images,
            "image_size": self.image_size,
            "seconds": 30.0,
        }

        def measure(folder: Path, tell: Tell) -> Result:
            import torch

            from pacatune.reports.provenance import Noise, cpu_name, num_cores

            torch.set_num_threads(num_cores())
            noise = Noise()
            result = measure_steps(self.build, tuple(methods), **sizes)
            device = f"{cpu_name()}, {num_cores()} threads"
            return {**result, "device": device, "noise": noise.to_dict()}

        def columns(results: Results) -> list[tuple[Column, Numbers]]:
            if "steps" not in results:
                return []
            steps, rows = results["steps"], self.table.rows
            times, saved = steps_of_ours(steps), steps["saved_bytes"]
            others = steps["noise"]["num_cores_of_others"]
            busy = "" if others is None else f"; other processes kept {others} cores busy"
            of_step = (
                f"{self.model} with random weights, {self.num_images} images of "
                f"{self.image_size} px, float32, rank {RANK} ({steps['device']}; "
                f"{steps['num_rounds']} rounds{busy})."
            )
            time = Column(
                quantity=Quantity("step_time", "time of a step", "of PaCA's", "time", 0.02),
                paper=self.table.quantity("time"),
                model=f"{self.model}, random weights",
                rank=small_rank,
                about=of_step,
            )
            kept = replace(
                time,
                quantity=Quantity("kept", "kept for backward", "MB", "memory", 0.005),
                paper=self.table.quantity("memory"),
                about=f"Exact, of the same step: {of_step} The paper's memory holds weights "
                "and optimizer state as well.",
            )
            counts = {row.key: Measured.exact(saved[row.method] / _MB, "counted") for row in rows}
            return [(time, {row.key: times[row.method] for row in rows}), (kept, counts)]

        cell = Cell(
            key="steps",
            title=f"measuring steps of {self.model} with random weights",
            methods=tuple(self.table.methods()),
            inputs={"model": self.model, "methods": methods, **sizes},
            run=measure,
        )
        return Source(cells=[cell], columns=columns)

    # Full scale: the presets of `pacatune train-image`.

    def _full_source(self) -> Source:
        """Return everything that the paper reports."""
        about = (
            "By `pacatune train-image`; memory and time are of CIFAR-10: the paper does not "
            "say of which data set its are."
        )

        def columns(results: Results) -> list[tuple[Column, Numbers]]:
            values = {row.key: self._full_values(row, results) for row in self.table.rows}
            return [
                (
                    same_column(paper, f"full_{paper.key}", f"{paper.title}, measured", about),
                    {
                        line: Measured.exact(found[paper.key], "measured")
                        for line, found in values.items()
                        if paper.key in found
                    },
                )
                for paper in self.table.quantities
            ]

        cells = [
            _full_cell(row, score, preset)
            for row in self.table.rows
            for score, preset in self.presets.items()
        ]
        return Source(cells=cells, columns=columns)

    def _full_values(self, row: Row, results: Results) -> dict[str, float]:
        """Return what a line reached in the quantities of the paper, in its units."""
        runs = {
            score: result
            for score in self.presets
            if (result := results.get(f"full-{row.key}-{score}")) is not None
        }
        values = {score: 100 * run["accuracy_after"] for score, run in runs.items()}
        if len(values) == len(self.presets):
            values["average"] = sum(values.values()) / len(values)
        if "cifar10" in runs:
            run = runs["cifar10"]
            values["memory"] = run["peak_memory_bytes"] / 1e9
            values["time"] = run["step_ms"] * run["num_steps"] / 6e4
        return values

    def _settings(self, scale: Scale) -> list[SettingsBeside]:
        """Return ours beside the paper's, which gives none."""
        why = dict.fromkeys(
            ("rank", "alpha", "learning_rates", "batch_size", "epochs", "steps", "scheduler"),
            "the paper gives no settings for images",
        )
        why |= {"precision": "float32, as `train-image`", "optimizer": "the paper names none"}
        why["model"] = "its name on the hub; the paper does not say which weights"
        if scale == "small":
            why["model"] = "a real one that comes as a Python package"
            why["data"] = "comes as a Python package; the other data sets do not"
        return [
            SettingsBeside(
                title=row.title,
                paper=Settings(model=self.model, data=", ".join(self.presets)),
                ours=self._small_settings(row) if scale == "small" else self._full_settings(row),
                why=why,
                commands=()
                if scale == "small"
                else tuple(_full_line(row, preset) for preset in self.presets.values()),
            )
            for row in self.table.rows
        ]

    def _small_settings(self, row: Row) -> Settings:
        return Settings(
            model=self.small_model,
            data="8,000 of CIFAR-10's test images",
            rank=small_rank(row),
            alpha=small_rank(row),
            steps=self.num_steps,
        )

    def _full_settings(self, row: Row) -> Settings:
        run = full_run(row, next(iter(self.presets.values())))
        return Settings(
            model=run.model.path,
            data=", ".join(self.presets),
            rank=None if row.method == "full" else getattr(run, row.method).r,
            learning_rates=(run.training.learning_rate,),
            batch_size=run.training.per_device_train_batch_size,
            epochs=run.training.num_train_epochs,
        )


def full_run(row: Row, preset: str) -> Any:
    """Return the run of a line by a preset of `train-image`."""
    from pacatune.training import RunConfig
    from pacatune.training.image.config import find_preset

    options: dict[str, Any] = {"model": {}, "data": {}, "training": {}}
    for name, value in find_preset(preset).items():
        section, _, key = name.partition(".")
        options[section][key] = value
    options["training"]["report_to"] = "none"
    return RunConfig(task="image", method=row.method, **options)


def _full_line(row: Row, preset: str) -> str:
    """Return its command, as it is typed."""
    return f"pacatune train-image --preset {preset} --method {row.method}"


def _full_cell(row: Row, score: str, preset: str) -> Cell:
    def run(folder: Path, tell: Tell) -> Result:
        report, _ = Runs(folder=folder, tell=tell).train(full_run(row, preset), "run")
        names = ("accuracy_after", "peak_memory_bytes", "step_ms", "num_steps")
        return {name: report[name] for name in names}

    return Cell(
        key=f"full-{row.key}-{score}",
        title=_full_line(row, preset),
        methods=(row.method,),
        inputs={"method": row.method, "preset": preset},
        run=run,
    )


TABLE_6_EXPERIMENT = _Images(
    table=TABLE_6,
    task="dinov2-cifar10",
    learning_rates={"lora": [1e-3, 3e-3, 9e-3], "paca": [1e-3, 3e-3, 9e-3]},
    small_model="DINOv2-S (22 M parameters, fine-tuned for saliency by others)",
    num_steps=30,
    build=build_vit,
    model="ViT-B/16",
    num_images=4,
    image_size=224,
    presets={name: f"vit-b16-{name}" for name in ("cifar10", "cifar100", "pets", "flowers102")},
).experiment(
    "The paper fine-tunes ViT-B/16, a transformer for images, on four data sets, by LoRA "
    "and by PaCA, to show that PaCA is not for language alone.",
    "CIFAR-100, Oxford-IIIT Pets and Oxford-Flowers 102 cannot be had offline, so their "
    "columns have no counterpart at the small scale.",
)

TABLE_7_EXPERIMENT = _Images(
    table=TABLE_7,
    task="efficientnet-cifar10",
    learning_rates={"paca": [2e-3, 6e-3, 1.8e-2], "full": [3e-4, 1e-3, 3e-3]},
    small_model="EfficientNet-Lite0 (3.4 M parameters, ImageNet weights)",
    num_steps=40,
    build=build_efficientnet,
    model="EfficientNetV2-L",
    num_images=2,
    image_size=192,
    presets={name: f"efficientnetv2-l-{name}" for name in ("cifar10", "cifar100")},
).experiment(
    "LoRA's matrices are linear layers and do not merge into every kind of convolution; "
    "PaCA trains some input channels of any. The paper fine-tunes EfficientNetV2-L, a "
    "convolutional network, in full and by PaCA.",
    "CIFAR-100 cannot be had offline, so its column has no counterpart at the small scale.",
    "The paper trained BatchNorm in a way that it does not state; here it stays in "
    "evaluation mode.",
)
