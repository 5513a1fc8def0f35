"""What arms of the dial cost: bytes that they keep and times of steps, and both costs at 8B.

    python -m benchmarks.cost            writes benchmarks/results/cost-TASK.json, and cost-8b.json
    python -m benchmarks.cost minilm     the first of a single task

The arms take turns, one step each per round on the first batch of seed 0, as `train` would make it:
models for texts in bfloat16 under autocast, of whose frozen weights it makes no copies for PEFT's
methods. It takes a quarter of an hour, and the data of `python -m examples.packaged`.
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

from benchmarks.results import (
    at_least_1,
    compare,
    counted,
    new_parser,
    record,
    take_turns,
)
from benchmarks.study_runs import KEPT
from benchmarks.verdict import plans
from examples.images import kept_bytes
from experiments.study.config import StudyConfig, merged
from experiments.study.images import ImageTask
from experiments.study.tasks import StudyTask
from pacatune.measure.estimate import estimate_memory
from pacatune.measure.setting import Setting
from pacatune.reports.rows import Row
from pacatune.training.language import Task
from pacatune.training.recipe import make_trainer

TASKS = ("minilm", "dinov2-digits", "smollm2-sort")
"""Those whose steps differ; words to reverse have those of words to sort."""
_LARGE = "8b"
_USUAL = {
    "model": {"attn_implementation": None, "dtype": "bfloat16"},
    "lean": "auto",
    "training": {"train_sampling_strategy": "random"},
}
"""What the runs of the dial change of a step, as it is by default, and a base in bfloat16."""
_FLOAT32 = {"model": {"attn_implementation": None}, "training": {"bf16": False}}
"""The same of images: a base in float32, of which autocast would keep copies for LoRA."""
_QUIET = Console(quiet=True)


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


def in_turns(task: str, args: argparse.Namespace) -> Iterator[Row]:
    """Yield what arms of the dial keep on a task, and the times of their steps."""
    with tempfile.TemporaryDirectory() as folder:
        steps, kept = steps_of(plans()[task], Path(folder))
        for arm, number in kept.items():
            yield counted(KEPT, arm, number, "bytes", setting=task)
        pairs = [(arm, "lora16") for arm in steps if arm != "lora16"]
        yield from compare(take_turns(steps, args), args.seed, pairs, setting=task)


def cost_of_arms() -> list[Row]:
    """Return the bytes kept and the state of each arm for LLaMA3-8B, by `pacatune estimate`."""
    rows = []
    for name, arm in plans()["minilm"].arms.items():  # which has all arms
        setting = Setting(
            model="llama3-8b",
            method=arm.method,
            rank=arm.rank or 0,
            channels=arm.options.get("paca", {}).get("channels"),
            seq_len=2048,
        )
        estimate = estimate_memory(setting)
        # Originals are in the adapter. The gradient is as large as each of the two moments.
        state = estimate.by_category["adapter"] + estimate.by_category["optimizer"] * 3 // 2
        for what, number in (("kept for backward", estimate.saved_bytes), ("state", state)):
            names = {"model": setting.model, "setting": f"{setting.seq_len:,} tokens"}
            rows.append(
                Row(what=what, method=name, value=number, unit="bytes", origin="simulated", **names)
            )
    return rows


def main(options: list[str] | None = None) -> None:
    """Count, measure and write the results."""
    parser = new_parser(__doc__, is_timed=True)
    add = parser.add_argument
    add("tasks", nargs="*", metavar="TASK", help=f"{', '.join(TASKS)}, 8b; without any, all")
    add("--seconds", type=float, default=60.0, help="time for each task")
    add("--min-rounds", type=at_least_1, default=7)
    add("--warmup", type=int, default=1, help="rounds before, not counted")
    args = parser.parse_args(options)
    if unknown := set(args.tasks) - {*TASKS, _LARGE}:
        parser.error(f"no such task: {', '.join(sorted(unknown))}")
    how = "first batch of seed 0; medians of steps, all arms alternating in one run"
    at_8b = "of LLaMA3-8B adapter, gradient and moments, and what backward needs"
    for task in args.tasks or (*TASKS, _LARGE):
        if task == _LARGE:
            record(f"cost-{_LARGE}", at_8b, cost_of_arms, args, options)
        else:
            record(f"cost-{task}", how, lambda task=task: [*in_turns(task, args)], args, options)


if __name__ == "__main__":
    sys.exit(main())
