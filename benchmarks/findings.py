"""Tables of docs/quality.md and docs/lora.md about the study at equal cost, and about rates."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import fmean

from benchmarks import verdict
from benchmarks.results import RESULTS
from benchmarks.study_runs import forgetting, reached, stage_two, studies, title, told
from experiments.study.statistics import Run, Study, best_rate, compared, validated
from pacatune.methods import METHODS
from pacatune.reports.rows import Table
from pacatune.training.config import default_rate
from pacatune.training.tasks import TASKS as TRAINING_TASKS

_DEFAULT, _LEFT = "paca16", ("pool16", "spread16")
"""The default of `train`; arms that are no longer there."""
_STEPS = {"minilm": 120, "dinov2": 60, "smollm2-words": 40, "smollm2-sort": 40}
"""Steps of each task's runs."""


def block(name: str, results: Path = RESULTS) -> str:
    """Return the text of a block `found-NAME` of the docs."""
    if name == "defaults":
        table: Table | str = _defaults()
    elif name == "rates":
        table = _rates(studies(results), verdict.studies(results))
    else:
        table = _OF_STUDIES[name](studies(results))
    return table if isinstance(table, str) else "\n".join(table.markdown())


def _arms(study: Study) -> dict[str, dict[int, Run]]:
    """Return the arms that ran with all seeds, and exist."""
    return {arm: runs for arm, runs in stage_two(study).items() if arm not in _LEFT}


def _default(tasks: dict[str, Study]) -> Table:
    """Return how the default differs in test loss from every other arm, by task."""
    found = {}
    for task, study in tasks.items():
        arms = _arms(study)
        found[task] = compared(arms, [(_DEFAULT, arm) for arm in arms if arm != _DEFAULT])
    return told(found)


def _reached(tasks: dict[str, Study]) -> Table:
    """Return the test loss and the score of every arm that ran to the end, by task."""
    return reached({task: _arms(study) for task, study in tasks.items()})


def _forgotten(tasks: dict[str, Study]) -> str:
    """Return what the default forgets more than LoRA."""
    return forgetting(tasks, [_DEFAULT])


def _rates(short: dict[str, Study], long: dict[str, Study]) -> Table:
    """Return the best rate of each arm by task and length of run, and its mean validation loss.

    Arms that are compared, and LoRA of rank 8.
    """
    names = dict.fromkeys(arm for study in short.values() for arm in _arms(study)) | {"lora8": None}
    columns = {
        f"{title(task)}, {_STEPS[task]} steps": {
            arm: _early(study[arm]) for arm in names if arm in study
        }
        for task, study in short.items()
    }
    for task, study in long.items():
        steps = f"{next(iter(study.values()))[0]['steps']:.0f}"
        columns[f"{title(task)}, {steps} steps"] = {
            arm: _best(study[arm]) for arm in verdict.arms_of(study)
        }
    arms = dict.fromkeys(arm for column in columns.values() for arm in column)
    cells = [[f"`{arm}`", *(column.get(arm, "-") for column in columns.values())] for arm in arms]
    return Table(header=["arm", *columns], cells=cells)


def _defaults() -> Table:
    """Return the rates that `train` takes where none is given."""
    shown = ("paca", "lora", "full")
    cells = []
    for name, spec in TRAINING_TASKS.items():
        rates = [default_rate(spec, method) for method in shown]
        cells.append([f"`{name}`", *map(_rate_text, rates)])
    return Table(header=["`--task`", *(METHODS[m].title for m in shown)], cells=cells)


def _early(runs: Sequence[Run]) -> str:
    """Return an arm's best rate, and its mean validation loss with the two seeds of all arms."""
    best = best_rate(runs)
    assert best is not None, "every arm has runs"
    at_best = [run for run in runs if run["learning rate"] == best and run["seed"] < 2]
    return f"{_rate_text(best)}: {fmean(run['validation loss'] for run in at_best):.3f}"


def _best(runs: Sequence[Run]) -> str:
    """Return an arm's best rate, and the mean validation loss that chose it."""
    means = validated(runs)
    best = min(means, key=lambda rate: means[rate])
    return f"{_rate_text(best)}: {means[best]:.3f}"


def _rate_text(rate: float) -> str:
    mantissa, _, exponent = f"{rate:.3e}".partition("e")
    return f"{float(mantissa):g}e{int(exponent)}"


_OF_STUDIES = {"default": _default, "reached": _reached, "forgotten": _forgotten}
"""Name of a block -> what makes it of the study at equal cost."""


def names() -> Iterable[str]:
    """Return the names of all blocks."""
    return (*_OF_STUDIES, "rates", "defaults")
