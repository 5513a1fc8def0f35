"""What is seen of a run: a bar on a terminal, lines elsewhere; warnings and the result."""

import statistics
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text
from transformers import TrainerCallback, TrainingArguments

from pacatune.files.folder import format_bytes
from pacatune.measure.device import peak_process_bytes
from pacatune.training.report import Report

_NUM_LINES = 20
# What is said of an evaluation beside its loss.
_SAID = ("accuracy", "rewards/accuracies", "rewards/margins", "margin", "reward")


class Meter(TrainerCallback):
    """Measures steps: their time, and how many tokens they process.

    Evaluation, saving and logging lie between steps and are not counted. The clock is the host's:
    `RunTrainer` waits for the device once in each step.
    """

    def __init__(self) -> None:
        self.num_items: float | torch.Tensor = 0
        self.step_seconds: list[float] = []
        self._start = 0.0

    def add(self, number: float | torch.Tensor) -> None:
        """Count what a micro-batch holds, on its device so that nothing waits."""
        self.num_items = self.num_items + number

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        """Start the clock of a step."""
        self._start = time.perf_counter()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """Stop the clock."""
        self.step_seconds.append(time.perf_counter() - self._start)

    @property
    def items_per_second(self) -> float:
        """Tokens of this process per second of its steps; 0 before the first."""
        seconds = sum(self.step_seconds)
        return float(self.num_items) / seconds if seconds else 0.0

    @property
    def step_ms(self) -> float | None:
        """Median time of a step; the first, which warms up, is left out where there are others."""
        seconds = self.step_seconds[1:] or self.step_seconds
        return 1000 * statistics.median(seconds) if seconds else None


class ProgressReporter(TrainerCallback):
    """Shows loss, speed and memory of the main process."""

    def __init__(self, console: Console, meter: Meter) -> None:
        self._console, self._meter = console, meter
        self._bar: Progress | None = None

    def on_train_begin(self, args: Any, state: Any, *_: Any, **__: Any) -> None:
        """Show an empty bar."""
        if self._console.is_terminal and not self._console.quiet and not args.disable_tqdm:
            words = TextColumn("step {task.completed:.0f}/{task.total:.0f}")
            status = TextColumn("{task.description}")
            columns = (words, BarColumn(), status, TimeRemainingColumn())
            self._bar = Progress(*columns, console=self._console)
            self._bar.start()
            self._bar.add_task("", total=state.max_steps, completed=state.global_step)

    def on_step_end(self, args: Any, state: Any, *_: Any, **__: Any) -> None:
        """Move the bar."""
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=state.global_step)

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any
    ) -> None:
        """Show the newest losses; without a bar, print about 20 lines per run."""
        logs = logs or {}
        every = max(1, state.max_steps // _NUM_LINES)
        step = f"step {state.global_step}/{state.max_steps}"
        if "eval_loss" in logs:
            # The loss of reinforcement learning says nothing of the rewards, and is about 0.
            names = [] if logs.get("eval_reward") is not None else ["loss"]
            said = _numbers({name: logs.get(f"eval_{name}") for name in (*names, *_SAID)}, ", ")
            say(self._console, f"{step}: evaluation {said}")
        elif "loss" in logs:
            shown = next(key for key in ("reward", "loss") if logs.get(key) is not None)
            memory = format_bytes(peak_memory_bytes()[0])
            speed = f"{self._meter.items_per_second:,.0f} tokens/s  peak {memory}"
            status = f"{_numbers({shown: logs[shown]})}  {speed}"
            if self._bar is not None:
                self._bar.update(self._bar.task_ids[0], description=status)
            elif state.global_step % every == 0 or state.global_step == 1:
                say(self._console, f"{step}: {status}")

    def close(self) -> None:
        """Leave the bar where it is and give the terminal back, also when training failed."""
        if self._bar is not None:
            self._bar.stop()


def _numbers(values: dict[str, float | None], between: str = "  ") -> str:
    return between.join(
        f"{name} {value:.4f}" for name, value in values.items() if value is not None
    )


def peak_memory_bytes() -> tuple[int, str]:
    """Return the peak memory and what it is: of the GPU where there is one, else of the process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated(), "cuda_max_memory_allocated"
    return peak_process_bytes(), "process_peak_resident"


def main_console(arguments: TrainingArguments, console: Console | None) -> Console:
    """Return the console of the main process; the others get one that prints nothing."""
    if arguments.process_index != 0:
        return Console(quiet=True)
    return console or Console()


def say(console: Console, text: str) -> None:
    """Print a line as it is, however long."""
    console.print(text, soft_wrap=True, highlight=False)


def show_warnings(warnings: list[str], console: Console) -> None:
    """Print each warning on a line of its own."""
    for warning in warnings:
        console.print(Text.assemble(("warning: ", "yellow"), warning), soft_wrap=True)


def show_result(report: Report, folder: Path, console: Console) -> None:
    """Print the results and where they are."""
    table = Table(show_header=False, box=None)
    for name, value in report.table():
        table.add_row(name, value)
    console.print(table)
    what = "adapter" if report.targets else "model"
    say(console, f"{what}, report and model card are in {folder}")
    show_warnings(report.risen(), console)
