"""Small scale of Tables 2, 3 and 5: SmolLM2-135M on questions and answers, by a study.

A judge of answers is not to be had offline, so what is compared is the loss on held-out answers.
"""

from typing import Any

from pacatune.experiments.paper.settings import Settings
from pacatune.experiments.paper.tables import Quantity, Table
from pacatune.experiments.reproduce.cells import Cell
from pacatune.experiments.reproduce.compare import Column
from pacatune.experiments.reproduce.experiment import Results, SettingsBeside
from pacatune.experiments.reproduce.measured import Measured
from pacatune.experiments.reproduce.scale import small_dtype
from pacatune.experiments.reproduce.settings_of import of_run
from pacatune.experiments.reproduce.study_cells import SPREAD_NOTE, one_arm, scores_of, study_cell
from pacatune.experiments.study import Arm, StudyConfig

__all__ = ["KEY", "chat_cell", "chat_column", "chat_numbers", "chat_settings", "chat_study"]

KEY = "small_loss"
_TASK = "smollm2-chat"
_MODEL = "SmolLM2-135M-Instruct"
_STEPS = 12
# Columns of the largest gradients need smaller ones than others.
_RATES = [5e-4, 1.5e-3, 4e-3]
_SELECTION_BATCHES = 8
# Of some 560 questions; what rates are chosen by.
_VALIDATION = 0.05
_PREFIX = "small-"


def chat_study(
    method: str, rank: int | None, selection: str = "random", seeds: tuple[int, ...] = (0, 1)
) -> StudyConfig:
    """Return the study of one method.

    Args:
        method: By the paper's name.
        rank: As in the paper.
        selection: Of PaCA's columns.
        seeds: Of data, columns and LoRA; the first chooses the rate.
    """
    options: dict[str, Any] = {
        "model": {"dtype": small_dtype()},
        "training": {"max_steps": _STEPS, "lr_scheduler_type": "linear", "warmup_steps": 0.1},
    }
    if method.endswith("paca"):
        options["paca"] = {"selection_batches": _SELECTION_BATCHES}
    # alpha = rank: the update is not scaled, and the grid of rates is the same for every rank.
    arm = Arm(method=method, rank=rank, selection=selection, learning_rates=list(_RATES))
    return one_arm(
        _TASK, method, arm, options=options, seeds=list(seeds), validation_fraction=_VALIDATION
    )


def chat_cell(
    method: str,
    rank: int | None,
    key: str,
    selection: str = "random",
    seeds: tuple[int, ...] = (0, 1),
) -> Cell:
    """Return the cell of one line.

    Args:
        method: By the paper's name.
        rank: As in the paper.
        key: Of the line.
        selection: Of PaCA's columns.
        seeds: Of data, columns and LoRA.
    """
    how = "" if selection == "random" else f", columns by {selection}"
    return study_cell(
        chat_study(method, rank, selection, seeds),
        f"{_PREFIX}{key}",
        f"{_MODEL} by {method}, rank {rank}{how}",
        method,
    )


def chat_column(table: Table) -> Column:
    """Return the column of the held-out loss, beside the average of MT-Bench."""
    return Column(
        quantity=Quantity(
            key=KEY,
            title="loss on held-out answers, small model",
            unit="nats per token",
            kind="score",
            margin=0.02,
        ),
        paper=table.quantity("average"),
        is_same=False,
        is_inverted=True,
        about=f"{_MODEL}, {_STEPS} steps of 8 questions and answers; for every method the best of "
        f"the learning rates {', '.join(f'{rate:g}' for rate in _RATES)} on validation data. Less "
        f"is better. {SPREAD_NOTE}",
    )


def chat_numbers(lines: dict[str, str], results: Results) -> dict[tuple[str, str], Measured]:
    """Return the losses that there are.

    Args:
        lines: Key of a cell -> key of the line.
        results: All there are.
    """
    cells = {line: f"{_PREFIX}{key}" for key, line in lines.items()}
    return {(line, KEY): score for line, score in scores_of(cells, results).items()}


def chat_settings(
    title: str, method: str, rank: int | None, paper: Settings, selection: str = "random"
) -> SettingsBeside:
    """Return a line's settings beside the paper's."""
    from pacatune.experiments.study.plan import arm_options
    from pacatune.experiments.study.task import merged
    from pacatune.experiments.study.text import TextTask

    study = chat_study(method, rank, selection)
    (arm,) = study.arms.values()
    base = {
        "model": {"path": _MODEL},
        "data": {"path": "chatterbot-corpus", "eval_path": "heldout"},
        "training": {"per_device_train_batch_size": 8},
    }
    task = TextTask(merged(base, study.options), study.validation_fraction, 0)
    rate = {"training": {"learning_rate": _RATES[0]}}
    run = task.make_config(arm_options(arm, arm.rank), rate)
    why = {
        "model": "the largest real one that comes as a Python package",
        "data": "comes as a Python package; there is no judge offline, so its held-out loss counts",
        "alpha": "the rank, so that every rank has the same scale; its place is taken by the rate",
        "learning_rates": "a grid around what suits this model and number of steps",
        "precision": "what this processor multiplies fast",
        "batch_size": "as many as two cores do in a few seconds",
        "micro_batches": "a small batch needs none",
        "seq_len": "nothing is longer in this data",
        "epochs": "a quarter of an hour for the table",
        "steps": "a quarter of an hour for the table",
    }
    grid = Settings(learning_rates=tuple(_RATES))
    return SettingsBeside(
        title=title, paper=paper, ours=of_run(run, "chatterbot-corpus", grid=grid), why=why
    )
