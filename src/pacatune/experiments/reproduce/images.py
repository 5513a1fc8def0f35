"""What Tables 6 and 7 share: a real small model, the paper's own without its weights, presets."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal

from pacatune.experiments.paper.settings import Settings
from pacatune.experiments.paper.tables import Quantity, Row
from pacatune.experiments.reproduce.bench_cells import steps_of_ours
from pacatune.experiments.reproduce.beside import fill_section
from pacatune.experiments.reproduce.cells import Cell
from pacatune.experiments.reproduce.commands import shell_line
from pacatune.experiments.reproduce.compare import Column
from pacatune.experiments.reproduce.experiment import Experiment, Mode, Results, SettingsBeside
from pacatune.experiments.reproduce.image_runs import (
    full_cell,
    full_columns,
    full_numbers,
    full_run,
    full_words,
)
from pacatune.experiments.reproduce.image_spec import ImageTable
from pacatune.experiments.reproduce.measured import Measured
from pacatune.experiments.reproduce.section import Section
from pacatune.experiments.reproduce.study_cells import SPREAD_NOTE, one_arm, scores_of, study_cell
from pacatune.experiments.study import Arm, StudyConfig

__all__ = ["make_experiment"]

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


def make_experiment(spec: ImageTable) -> Experiment:
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
    rank = None if row.method == "full" else _RANK
    arm = Arm(method=row.method, rank=rank)
    return one_arm(spec.task, row.method, arm, options=options, seeds=list(_SEEDS))


def _cells(spec: ImageTable, mode: Mode) -> list[Cell]:
    rows = spec.table.rows
    if mode == "full":
        return [
            full_cell(row, score, preset) for row in rows for score, preset in spec.presets.items()
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

    from pacatune.experiments.reproduce.image_steps import measure_steps
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
        columns, ours = full_columns(spec), full_numbers(spec, results)
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


def _small_columns(spec: ImageTable, results: Results) -> list[Column]:
    table = spec.table
    of_step = _describe_steps(spec, results.get("steps"))
    return [
        Column(
            quantity=Quantity(
                key=_TIME, title="time of a step", unit="of PaCA's", kind="time", margin=0.02
            ),
            paper=table.quantity("time"),
            is_same=False,
            about=of_step,
        ),
        Column(
            quantity=Quantity(
                key=_KEPT, title="kept for backward", unit="MB", kind="memory", margin=0.005
            ),
            paper=table.quantity("memory"),
            is_same=False,
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
            rank = None if row.method == "full" else _RANK
            ours = Settings(model=model, data=data, rank=rank, alpha=rank, steps=spec.num_steps)
            why |= {
                "model": "a real one that comes as a Python package",
                "data": "comes as a Python package; the other data sets do not",
            }
            found.append(SettingsBeside(title=row.title, paper=_paper(spec), ours=ours, why=why))
            continue
        runs = {score: full_run(row, preset) for score, preset in spec.presets.items()}
        run = next(iter(runs.values()))
        ours = Settings(
            model=run.model.path,
            data=", ".join(spec.presets),
            rank=None if row.method == "full" else getattr(run, row.method).r,
            learning_rates=(run.training.learning_rate,),
            batch_size=run.training.per_device_train_batch_size,
            epochs=run.training.num_train_epochs,
        )
        commands = tuple(shell_line(full_words(row, preset)) for preset in spec.presets.values())
        why |= {"model": "its name on the hub; the paper does not say which weights"}
        found.append(
            SettingsBeside(
                title=row.title, paper=_paper(spec), ours=ours, why=why, commands=commands
            )
        )
    return found


def _paper(spec: ImageTable) -> Settings:
    return Settings(model=spec.model, data=", ".join(spec.presets))
