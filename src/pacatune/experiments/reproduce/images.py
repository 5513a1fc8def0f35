"""Tables 6 and 7: ViT-B/16 and EfficientNetV2-L on images.

At the small scale a real small model is trained, and steps of the paper's own are measured with
random weights; at the full scale they are the presets of `pacatune train-image`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from pacatune.experiments.reproduce.comparison import fill_section
from pacatune.experiments.reproduce.experiment import Cell, Experiment, Mode, Results
from pacatune.experiments.reproduce.image_steps import build_efficientnet, build_vit, measure_steps
from pacatune.experiments.reproduce.runs import Runs
from pacatune.experiments.reproduce.scores import SPREAD_NOTE, one_arm, scores_of, study_cell
from pacatune.experiments.reproduce.section import Measured, Section
from pacatune.experiments.reproduce.settings import SettingsBeside
from pacatune.experiments.reproduce.steps import steps_of_ours
from pacatune.experiments.reproduce.verdicts import Column
from pacatune.experiments.study import Arm, StudyConfig
from pacatune.paper.settings import Settings
from pacatune.paper.tables import TABLE_6, TABLE_7, Quantity, Row, Table

__all__ = ["TABLE_6_EXPERIMENT", "TABLE_7_EXPERIMENT", "ImageTable"]

_RANK = 8
_SEEDS = [0, 1]
_EVAL_PER_CLASS = 50
_NUM_CLASSES = 10
_MB = 10**6
_SCORE, _TIME, _KEPT = "small_accuracy", "step_time", "kept"
_CANNOT = (
    "`pacatune estimate` runs the steps of causal language models only, so the memory of image "
    "models cannot be simulated; --scale small counts what they keep for the backward pass."
)


@dataclass(frozen=True, kw_only=True)
class ImageTable:
    """What distinguishes Table 6 from Table 7."""

    table: Table
    about: tuple[str, ...]
    task: str
    """Packaged task of a study."""
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
    notes: tuple[str, ...] = ()


def _experiment(spec: ImageTable) -> Experiment:
    """Return the experiment of one of the tables."""
    return Experiment(
        name=spec.table.name,
        title=spec.table.title,
        place=spec.table.place,
        methods=tuple(spec.table.methods()),
        cells=partial(_cells, spec),
        section=partial(_section, spec),
        settings=partial(_settings, spec),
        cannot={"simulate": _CANNOT},
    )


def _study(spec: ImageTable, row: Row) -> StudyConfig:
    options = {
        "data": {"eval_per_class": _EVAL_PER_CLASS},
        "training": {"max_steps": spec.num_steps, "warmup_steps": spec.num_steps // 5},
    }
    arm = Arm(method=row.method, rank=_small_rank(row))
    return one_arm(spec.task, row.method, arm, options=options, seeds=list(_SEEDS))


def _cells(spec: ImageTable, mode: Mode) -> list[Cell]:
    rows = spec.table.rows
    if mode == "full":
        return [
            _full_cell(row, score, preset) for row in rows for score, preset in spec.presets.items()
        ]
    others = [row.method for row in rows if row.method != "paca"]
    sizes = {
        "rank": _RANK,
        "num_images": spec.num_images,
        "image_size": spec.image_size,
        "seconds": 30.0,
    }
    steps = Cell(
        key="steps",
        title=f"measuring steps of {spec.model} with random weights",
        methods=tuple(row.method for row in rows),
        inputs={"model": spec.model, "methods": ["paca", *others], **sizes},
        run=partial(_measure, spec.build, ("paca", *others), sizes),
    )
    studies = [
        study_cell(
            _study(spec, row),
            f"small-{row.key}",
            f"{spec.small_model} by {row.method} on CIFAR-10",
            row.method,
        )
        for row in rows
    ]
    return [steps, *studies]


def _measure(
    build: Callable[[], Any],
    methods: tuple[str, ...],
    sizes: dict[str, Any],
    folder: Path,
    tell: Callable[[str], None],
) -> dict[str, Any]:
    import torch

    from pacatune.reports.provenance import Noise, cpu_name, num_cores

    torch.set_num_threads(num_cores())
    noise = Noise()
    result = measure_steps(build, methods, **sizes)
    return {**result, "device": f"{cpu_name()}, {num_cores()} threads", "noise": noise.to_dict()}


def _section(spec: ImageTable, mode: Mode, results: Results) -> Section:
    table = spec.table
    part = Section(
        name=table.name,
        title=table.title,
        place=table.place,
        about=list(spec.about),
        notes=list(spec.notes),
    )
    if mode == "full":
        columns, ours = _full_columns(spec), _full_numbers(spec, results)
    else:
        columns, ours = _small_columns(spec, results), _small_numbers(spec, results)
    fill_section(part, table, columns, ours)
    return part


def _describe_steps(spec: ImageTable, steps: dict[str, Any] | None) -> str:
    """Return what was measured where, and what else the machine did."""
    where = "" if steps is None else f"{steps['device']}; {steps['num_rounds']} rounds"
    others = None if steps is None else steps["noise"]["num_cores_of_others"]
    busy = "" if others is None else f"; other processes kept {others} cores busy"
    return (
        f"{spec.model} with random weights, {spec.num_images} images of {spec.image_size} px, "
        f"float32, rank {_RANK} ({where}{busy})."
    )


def _small_rank(row: Row) -> int | None:
    return None if row.method == "full" else _RANK


def _small_columns(spec: ImageTable, results: Results) -> list[Column]:
    table, random = spec.table, f"{spec.model}, random weights"
    of_step = _describe_steps(spec, results.get("steps"))
    return [
        Column(
            quantity=Quantity(
                key=_TIME, title="time of a step", unit="of PaCA's", kind="time", margin=0.02
            ),
            paper=table.quantity("time"),
            is_same=False,
            model=random,
            rank=_small_rank,
            about=of_step,
        ),
        Column(
            quantity=Quantity(
                key=_KEPT, title="kept for backward", unit="MB", kind="memory", margin=0.005
            ),
            paper=table.quantity("memory"),
            is_same=False,
            model=random,
            rank=_small_rank,
            about=f"Exact, of the same step: {of_step} The paper's memory holds weights and "
            "optimizer state as well.",
        ),
        Column(
            quantity=Quantity(
                key=_SCORE,
                title="accuracy of a small model on CIFAR-10",
                unit="%",
                kind="score",
                margin=1.0,
            ),
            paper=table.quantity("cifar10"),
            is_same=False,
            model=spec.small_model.partition(" (")[0],
            rank=_small_rank,
            about=f"{spec.small_model}, {spec.num_steps} steps of 32 images out of CIFAR-10's test "
            f"images, scored on {_EVAL_PER_CLASS * _NUM_CLASSES} others of them: not the usual "
            "accuracy on CIFAR-10. For each method the best of three learning rates on validation "
            "images. "
            f"{SPREAD_NOTE}",
        ),
    ]


def _small_numbers(spec: ImageTable, results: Results) -> dict[tuple[str, str], Measured]:
    found: dict[tuple[str, str], Measured] = {}
    steps = results.get("steps")
    times = {} if steps is None else steps_of_ours(steps)
    for row in spec.table.rows:
        if row.method in times and steps is not None:
            found[row.key, _TIME] = times[row.method]
            kept = steps["saved_bytes"][row.method] / _MB
            found[row.key, _KEPT] = Measured.exact(kept, "counted")
    cells = {row.key: f"small-{row.key}" for row in spec.table.rows}
    scores = scores_of(cells, results, _EVAL_PER_CLASS * _NUM_CLASSES)
    return found | {(line, _SCORE): score for line, score in scores.items()}


def _settings(spec: ImageTable, scale: Literal["small", "full"]) -> list[SettingsBeside]:
    """Return ours beside the paper's, which gives none."""
    why = dict.fromkeys(
        ("rank", "alpha", "learning_rates", "batch_size", "epochs", "steps", "scheduler"),
        "the paper gives no settings for images",
    )
    why |= {"precision": "float32, as `train-image`", "optimizer": "the paper names none"}
    found = []
    for row in spec.table.rows:
        if scale == "small":
            model, data = spec.small_model, "8,000 of CIFAR-10's test images"
            rank = _small_rank(row)
            ours = Settings(model=model, data=data, rank=rank, alpha=rank, steps=spec.num_steps)
            why |= {
                "model": "a real one that comes as a Python package",
                "data": "comes as a Python package; the other data sets do not",
            }
            found.append(SettingsBeside(title=row.title, paper=_paper(spec), ours=ours, why=why))
            continue
        runs = {score: _full_run(row, preset) for score, preset in spec.presets.items()}
        run = next(iter(runs.values()))
        ours = Settings(
            model=run.model.path,
            data=", ".join(spec.presets),
            rank=None if row.method == "full" else getattr(run, row.method).r,
            learning_rates=(run.training.learning_rate,),
            batch_size=run.training.per_device_train_batch_size,
            epochs=run.training.num_train_epochs,
        )
        commands = tuple(_full_line(row, preset) for preset in spec.presets.values())
        why |= {"model": "its name on the hub; the paper does not say which weights"}
        found.append(
            SettingsBeside(
                title=row.title, paper=_paper(spec), ours=ours, why=why, commands=commands
            )
        )
    return found


def _paper(spec: ImageTable) -> Settings:
    return Settings(model=spec.model, data=", ".join(spec.presets))


# Full scale: the presets of `pacatune train-image`.


def _full_run(row: Row, preset: str) -> Any:
    """Return the run of a line on one data set."""
    from pacatune.training.image import (
        ImageDataConfig,
        ImageModelConfig,
        ImageRunConfig,
        ImageTrainingConfig,
    )
    from pacatune.training.image.config import find_preset

    options: dict[str, dict[str, Any]] = {"model": {}, "data": {}, "training": {}}
    for name, value in find_preset(preset).items():
        section, _, key = name.partition(".")
        options[section][key] = value
    return ImageRunConfig(
        method=row.method,
        model=ImageModelConfig(**options["model"]),
        data=ImageDataConfig(**options["data"]),
        training=ImageTrainingConfig(**options["training"], report_to="none"),
    )


def _full_line(row: Row, preset: str) -> str:
    """Return its command, as it is typed."""
    return f"pacatune train-image --preset {preset} --method {row.method}"


def _full_cell(row: Row, score: str, preset: str) -> Cell:
    """Return the cell of a line on one data set.

    Args:
        row: The line.
        score: Key of the accuracy.
        preset: Name of a preset of `train-image`.
    """
    return Cell(
        key=f"full-{row.key}-{score}",
        title=_full_line(row, preset),
        methods=(row.method,),
        inputs={"method": row.method, "preset": preset},
        run=partial(_train, row, preset),
    )


def _train(row: Row, preset: str, folder: Path, tell: Callable[[str], None]) -> dict[str, Any]:
    report, _ = Runs(folder=folder, tell=tell).train(_full_run(row, preset), "run")
    names = ("accuracy_after", "peak_memory_bytes", "step_ms", "num_steps")
    return {name: report[name] for name in names}


def _full_columns(spec: ImageTable) -> list[Column]:
    """Return the columns of everything that the paper reports."""
    return [
        Column(
            quantity=Quantity(
                key=f"full_{paper.key}",
                title=f"{paper.title}, measured",
                unit=paper.unit,
                kind=paper.kind,
                margin=paper.margin,
            ),
            paper=paper,
            is_same=True,
            about="By `pacatune train-image`; memory and time are of CIFAR-10: the paper does not "
            "say of which data set its are.",
        )
        for paper in spec.table.quantities
    ]


def _full_numbers(spec: ImageTable, results: Results) -> dict[tuple[str, str], Measured]:
    """Return all numbers of the lines that were run in full."""
    found: dict[tuple[str, str], Measured] = {}
    for row in spec.table.rows:
        runs = {
            score: result
            for score in spec.presets
            if (result := results.get(f"full-{row.key}-{score}")) is not None
        }
        scores = {score: 100 * run["accuracy_after"] for score, run in runs.items()}
        if len(scores) == len(spec.presets):
            scores["average"] = sum(scores.values()) / len(scores)
        for score, value in scores.items():
            found[row.key, f"full_{score}"] = Measured.exact(value, "measured")
        if "cifar10" in runs:
            run = runs["cifar10"]
            memory, minutes = (
                run["peak_memory_bytes"] / 1e9,
                run["step_ms"] * run["num_steps"] / 6e4,
            )
            found[row.key, "full_memory"] = Measured.exact(memory, "measured")
            found[row.key, "full_time"] = Measured.exact(minutes, "measured")
    return found


# The two tables.


TABLE_6_EXPERIMENT = _experiment(
    ImageTable(
        table=TABLE_6,
        about=(
            "The paper fine-tunes ViT-B/16, a transformer for images, on four data sets, by LoRA "
            "and by PaCA, to show that PaCA is not for language alone.",
        ),
        task="dinov2-cifar10",
        small_model="DINOv2-S (22 M parameters, fine-tuned for saliency by others)",
        num_steps=30,
        build=build_vit,
        model="ViT-B/16",
        num_images=4,
        image_size=224,
        presets={
            "cifar10": "vit-b16-cifar10",
            "cifar100": "vit-b16-cifar100",
            "pets": "vit-b16-pets",
            "flowers102": "vit-b16-flowers102",
        },
        notes=(
            "CIFAR-100, Oxford-IIIT Pets and Oxford-Flowers 102 cannot be had offline, so their "
            "columns have no counterpart at the small scale.",
        ),
    )
)

TABLE_7_EXPERIMENT = _experiment(
    ImageTable(
        table=TABLE_7,
        about=(
            "LoRA's matrices are linear layers and do not merge into every kind of convolution; "
            "PaCA trains some input channels of any. The paper fine-tunes EfficientNetV2-L, a "
            "convolutional network, in full and by PaCA.",
        ),
        task="efficientnet-cifar10",
        small_model="EfficientNet-Lite0 (3.4 M parameters, ImageNet weights)",
        num_steps=40,
        build=build_efficientnet,
        model="EfficientNetV2-L",
        num_images=2,
        image_size=192,
        presets={
            "cifar10": "efficientnetv2-l-cifar10",
            "cifar100": "efficientnetv2-l-cifar100",
        },
        notes=(
            "CIFAR-100 cannot be had offline, so its column has no counterpart at the small scale.",
            "The paper trained BatchNorm in a way that it does not state; here it stays in "
            "evaluation mode.",
        ),
    )
)
