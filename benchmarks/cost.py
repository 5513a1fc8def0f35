"""Measure what the arms of the study at equal cost (studies/cost.md) cost.

    python -m benchmarks.cost               writes benchmarks/results/cost-minilm.json and so on

The step of each arm, on its study's model and data: all arms in one process, one step each per
round, on the same batch. And what adapter, gradient and optimiser state of LLaMA3-8B take, by
`pacatune estimate`.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.results import ROOT, at_least_1, compare, counted, new_parser, record, take_turns
from pacatune.measure.estimate import estimate_memory
from pacatune.measure.setting import Setting
from pacatune.reports.rows import Row
from pacatune.study.config import read_study
from pacatune.study.plan import Plan, make_plan
from pacatune.training.recipe import make_trainer, prepare
from pacatune.training.task import task_of

STUDIES = ("cost-minilm", "cost-dinov2", "cost-smollm2-words")
"""The two of SmolLM2 have equal steps."""
_QUIET = Console(quiet=True)


@dataclass(frozen=True)
class Step:
    """A step of a trainer on one batch; a call makes it and returns its seconds."""

    trainer: Any
    batch: Any

    def __call__(self) -> float:
        """Make it."""
        start = time.perf_counter()
        self.trainer.training_step(self.trainer.model, self.batch)
        self.trainer.optimizer.step()
        self.trainer.optimizer.zero_grad()
        return time.perf_counter() - start


def steps_of(plan: Plan, folder: Path) -> dict[str, Step]:
    """Return the step of each arm."""
    found = {}
    for name, arm in plan.arms.items():
        run = plan.make_run(name, arm.learning_rates[0], plan.config.seeds[0], folder)
        task = task_of(run)
        trainer = make_trainer(task, prepare(task, _QUIET), None, _QUIET)
        trainer.create_optimizer()
        trainer.current_gradient_accumulation_steps = 1  # set by the loop, which is not run
        found[name] = Step(trainer, next(iter(trainer.get_train_dataloader())))
    return found


def measure(name: str, args: argparse.Namespace) -> list[Row]:
    """Return the steps of a study's arms, and their state at 8B."""
    plan = make_plan(read_study(ROOT / "benchmarks" / "studies" / f"{name}.yaml"))
    with tempfile.TemporaryDirectory() as folder:
        found = take_turns(steps_of(plan, Path(folder)), args)
    first = str(plan.config.reference)
    pairs = [(arm, first) for arm in plan.arms if arm != first]
    return [*compare(found, args.seed, pairs, model=name, setting=""), *_at_8b(plan)]


def _at_8b(plan: Plan) -> Iterator[Row]:
    """Yield the state of the arms; groups change nothing of it, and SHiRA's is lora's."""
    for arm in plan.arms.values():
        if arm.rank is not None and arm.arm.method != "shira":  # looks at values to be made
            setting = Setting(model="llama3-8b", method=arm.arm.method, rank=arm.rank)
            parts = estimate_memory(setting).by_category
            number = 2 * parts["adapter"] + parts["optimizer"]  # the gradient is as large
            yield counted("state", arm.name, number, "bytes", model="llama3-8b", setting="")


def main(options: list[str] | None = None) -> None:
    """Measure, write the result, print it."""
    parser = new_parser(__doc__, is_timed=True)
    add = parser.add_argument
    add("--studies", nargs="+", choices=STUDIES, default=list(STUDIES))
    add("--seconds", type=float, default=60.0, help="time for each study")
    add("--min-rounds", type=at_least_1, default=7)
    add("--warmup", type=int, default=1, help="rounds before, not counted")
    args = parser.parse_args(options)
    how = "medians of steps of the arms of the study at equal cost, in turns on one batch"

    for name in args.studies:
        record(name, how, partial(measure, name, args), args, options)


if __name__ == "__main__":
    sys.exit(main())
