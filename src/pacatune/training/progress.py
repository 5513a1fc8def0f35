"""What is said of a run beside the trainer's own bar and lines: its speed, warnings, result."""

import statistics
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from transformers import TrainerCallback, TrainingArguments

from pacatune.measure.device import peak_process_bytes
from pacatune.training.report import Report


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
