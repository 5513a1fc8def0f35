"""Full scale of Tables 6 and 7: the presets of `pacatune train-image`."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from pacatune.experiments.paper.tables import Quantity, Row
from pacatune.experiments.reproduce.cells import Cell
from pacatune.experiments.reproduce.commands import Steps, shell_line
from pacatune.experiments.reproduce.compare import Column
from pacatune.experiments.reproduce.experiment import Results
from pacatune.experiments.reproduce.image_spec import ImageTable
from pacatune.experiments.reproduce.measured import Measured

__all__ = ["full_cell", "full_columns", "full_numbers", "full_run", "full_words"]


def full_run(row: Row, preset: str) -> Any:
    """Return the run of a line on one data set."""
    from pacatune.training.image import (
        ImageDataConfig,
        ImageModelConfig,
        ImageRunConfig,
        ImageTrainingConfig,
    )
    from pacatune.training.image.presets import find_preset

    options: dict[str, dict[str, Any]] = {"model": {}, "data": {}, "training": {}}
    for name, value in find_preset(preset).options().items():
        section, _, key = name.partition(".")
        options[section][key] = value
    return ImageRunConfig(
        method=row.method,
        model=ImageModelConfig(**options["model"]),
        data=ImageDataConfig(**options["data"]),
        training=ImageTrainingConfig(**options["training"], report_to="none"),
    )


def full_words(row: Row, preset: str) -> list[str]:
    """Return its command."""
    return ["train-image", "--preset", preset, "--method", row.method]


def full_cell(row: Row, score: str, preset: str) -> Cell:
    """Return the cell of a line on one data set.

    Args:
        row: The line.
        score: Key of the accuracy.
        preset: Of `train-image`.
    """
    return Cell(
        key=f"full-{row.key}-{score}",
        title=f"{shell_line(full_words(row, preset))}",
        methods=(row.method,),
        inputs={"method": row.method, "preset": preset},
        run=partial(_train, row, preset),
    )


def _train(row: Row, preset: str, folder: Path, tell: Callable[[str], None]) -> dict[str, Any]:
    steps = Steps(folder=folder, tell=tell, place="apart")
    report, _ = steps.train(full_run(row, preset), "run")
    names = ("accuracy_after", "peak_memory_bytes", "step_ms", "num_steps")
    return {name: report[name] for name in names}


def full_columns(spec: ImageTable) -> list[Column]:
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


def full_numbers(spec: ImageTable, results: Results) -> dict[tuple[str, str], Measured]:
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
