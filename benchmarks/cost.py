"""Count what arms of the studies keep, on a base in bfloat16, and time their steps.

    python -m benchmarks.cost               of cost.md: writes benchmarks/results/cost-kept.json
    python -m benchmarks.cost --dial        of dial.md: writes dial-steps.json, with times

The arms of the dial take turns, one step each per round on the first batch of seed 0, as `train`
would make it. The models for texts of the study at equal cost were in float32, under bfloat16
autocast, which copies each frozen weight for PEFT's methods. So its arms that still exist train one
step again, on the same batch. It takes minutes, and the data of `python -m examples.packaged`.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.dial import plans
from benchmarks.results import (
    ROOT,
    at_least_1,
    compare,
    counted,
    new_parser,
    record,
    take_turns,
)
from benchmarks.verdict import KEPT, stage_two, studies
from examples.images import kept_bytes
from experiments.study.config import StudyConfig, merged, read_study
from experiments.study.images import ImageTask
from experiments.study.tasks import StudyTask
from pacatune.reports.rows import Row
from pacatune.training.language import Task
from pacatune.training.recipe import make_trainer, run_trainer

FOLDER = ROOT / "experiments" / "study"
TASKS = ("minilm", "smollm2-sort", "smollm2-words")
"""Those that train under autocast."""
DIAL = ("minilm", "dinov2", "smollm2-sort")
"""Tasks of the dial whose steps differ; words to reverse have those of words to sort."""
_USUAL = {
    "model": {"attn_implementation": None, "dtype": "bfloat16"},
    "lean": "auto",
    "training": {"train_sampling_strategy": "random"},
}
"""What the runs of the dial change of a step, as it is by default, and a base in bfloat16."""
_FLOAT32 = {"model": {"attn_implementation": None}, "training": {"bf16": False}}
"""The same of images: a base in float32, of which autocast would keep copies for LoRA."""
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


@dataclass(frozen=True)
class TrainerStep:
    """A step of a trainer on its first batch; a call makes it and returns its seconds."""

    trainer: Any
    batch: Any

    def __call__(self) -> float:
        """Make it."""
        start = time.perf_counter()
        self.trainer.training_step(self.trainer.model, dict(self.batch))
        self.trainer.optimizer.step()
        self.trainer.optimizer.zero_grad()
        return time.perf_counter() - start


def steps_of(plan: StudyConfig, folder: Path) -> tuple[dict[str, TrainerStep], dict[str, float]]:
    """Return the step of each arm of a plan, and what its forward pass keeps."""
    steps, kept = dict[str, TrainerStep](), dict[str, float]()
    is_images = plan.command == "images"
    changed = replace(plan, options=merged(plan.options, _FLOAT32 if is_images else _USUAL))
    images, texts = (ImageTask(changed), None) if is_images else (None, StudyTask(changed))
    for name, arm in plan.arms.items():
        if images:
            trainer, _ = images.trainer_of(images.make_run(arm, 1e-3, 0, folder))
        else:
            task = Task(texts.make_run(arm, 1e-3, 0, folder))
            trainer = make_trainer(task, None, _QUIET)
        trainer.create_optimizer()
        trainer.current_gradient_accumulation_steps = 1  # set by the loop, which is not run
        trainer.model = trainer.accelerator.prepare(trainer.model)  # as the loop does: autocast
        batch = next(iter(trainer.get_train_dataloader()))
        steps[name] = TrainerStep(trainer, batch)
        if images:
            kept[name] = kept_bytes(trainer.model, batch)
            trainer.model.zero_grad()
        else:
            steps[name]()  # whose first is counted
            kept[name] = trainer.saved_activation_bytes
    return steps, kept


def in_turns(args: argparse.Namespace) -> Iterator[Row]:
    """Yield what arms of the dial keep, and the times of their steps, by task."""
    for task in DIAL:
        with tempfile.TemporaryDirectory() as folder:
            steps, kept = steps_of(plans()[task], Path(folder))
            for arm, number in kept.items():
                yield counted(KEPT, arm, number, "bytes", setting=task)
            pairs = [(arm, "lora16") for arm in steps if arm != "lora16"]
            yield from compare(take_turns(steps, args), args.seed, pairs, setting=task)


def main(options: list[str] | None = None) -> None:
    """Count and write the result."""
    parser = new_parser(__doc__, is_timed=True)
    add = parser.add_argument
    add("--dial", action="store_true", help="the arms of the dial, with their times")
    add("--seconds", type=float, default=60.0, help="time for each task")
    add("--min-rounds", type=at_least_1, default=7)
    add("--warmup", type=int, default=1, help="rounds before, not counted")
    args = parser.parse_args(options)
    if args.dial:
        how = "first batch of seed 0; medians of steps, all arms of a task alternating in one run"
        record("dial-steps", how, lambda: list(in_turns(args)), args, options)
        return
    how = "first batch of seed 0, base in bfloat16, adapters in float32, under autocast; counted"
    record("cost-kept", how, lambda: list(kept()), args, options)


if __name__ == "__main__":
    sys.exit(main())
