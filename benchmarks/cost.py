"""Count what arms of the study at equal cost (studies/cost.md) keep, on a base in bfloat16.

    python -m benchmarks.cost               writes benchmarks/results/cost-kept.json

The study's models for texts were in float32, under bfloat16 autocast, which copies each frozen
weight for PEFT's methods. So the arms that still exist train one step again, on the first batch of
seed 0. It takes minutes, and the data of `python -m examples.packaged`.
"""

import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.results import ROOT, counted, new_parser, record
from benchmarks.verdict import KEPT, stage_two, studies
from experiments.study.config import merged, read_study
from experiments.study.tasks import StudyTask
from pacatune.reports.rows import Row
from pacatune.training.language import Task
from pacatune.training.recipe import make_trainer, run_trainer

FOLDER = ROOT / "experiments" / "study"
TASKS = ("minilm", "smollm2-sort", "smollm2-words")
"""Those that train under autocast."""
_CHANGES = {"model": {"dtype": "bfloat16"}, "training": {"max_steps": 1, "bf16": True}}
_QUIET = Console(quiet=True)


def kept() -> Iterator[Row]:
    """Yield the bytes that each arm of the second stage keeps, where it still exists."""
    for name in TASKS:
        plan = read_study(FOLDER / f"{name}.yaml")
        study = StudyTask(replace(plan, options=merged(plan.options, _CHANGES)))
        for arm in filter(plan.arms.get, stage_two(studies()[name])):
            with tempfile.TemporaryDirectory() as folder:
                task = Task(study.make_run(plan.arms[arm], 1e-3, seed=0, folder=Path(folder)))
                trainer: Any = make_trainer(task, None, _QUIET)
                trainer.args.eval_on_start, trainer.args.eval_strategy = False, "no"
                run_trainer(trainer, task, None, _QUIET)
            yield counted(KEPT, arm, trainer.saved_activation_bytes, "bytes", setting=name)


def main(options: list[str] | None = None) -> None:
    """Count and write the result."""
    args = new_parser(__doc__).parse_args(options)
    how = "first batch of seed 0, base in bfloat16, adapters in float32, under autocast; counted"
    record("cost-kept", how, lambda: list(kept()), args, options)


if __name__ == "__main__":
    sys.exit(main())
