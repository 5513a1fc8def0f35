"""What is seen of a run: a bar on a terminal, lines elsewhere; warnings and the result."""

import statistics
from collections import deque
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text
from transformers import TrainerCallback

from pacatune.files.folder import format_bytes
from pacatune.measure.device import Stopwatch, peak_process_bytes
from pacatune.training.config import RunConfig
from pacatune.training.report import Report

_NUM_LINES = 20
# Held-out metrics by TRL's names -> what is said of them.
_SAID = {
    "eval_accuracy": "accuracy {:.3f}",
    "eval_rewards/accuracies": "accuracy {:.3f}",
    "eval_rewards/margins": "reward margin {:.4f}",
    "eval_margin": "margin {:.4f}",
    "eval_reward": "reward {:.4f}",
}


class Meter(TrainerCallback):
    """Measures steps: their time, and how many units they process.

    Evaluation, saving and logging lie between steps and are not counted. No step waits for a GPU:
    its time and its units are read when it is done, some steps later.
    """

    def __init__(self, unit: str = "tokens") -> None:
        self.unit = unit
        self.num_items: float | torch.Tensor = 0
        self._step_seconds: list[float] = []
        self._num_read: float | torch.Tensor = 0
        # Steps that the device may not have done yet, and the units counted when they end.
        self._watch = Stopwatch(_clock_device())
        self._running: deque[tuple[Stopwatch, float | torch.Tensor]] = deque()

    def add(self, number: float | torch.Tensor) -> None:
        """Count what a micro-batch holds, on its device so that nothing waits."""
        self.num_items = self.num_items + number

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        """Start the clock of a step."""
        self._watch = Stopwatch(_clock_device())
        self._watch.mark()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """Stop the clock when the device has finished the step."""
        number = self.num_items
        if isinstance(number, torch.Tensor):
            # On its way when the device is; what is added later is another tensor.
            number = number.to("cpu", non_blocking=True)
        self._watch.mark()
        self._running.append((self._watch, number))

    def _read(self, *, waits: bool) -> None:
        while self._running and (waits or self._running[0][0].is_done()):
            watch, self._num_read = self._running.popleft()
            self._step_seconds += watch.seconds()

    @property
    def step_seconds(self) -> list[float]:
        """Times of all steps; waits for the last."""
        self._read(waits=True)
        return self._step_seconds

    @property
    def current_rate(self) -> float:
        """Tokens or images per second of the steps that are done by now."""
        self._read(waits=False)
        return _rate(self._num_read, self._step_seconds)

    @property
    def items_per_second(self) -> float:
        """Tokens or images of this process per second of its steps; 0 before the first."""
        return _rate(self.num_items, self.step_seconds)

    @property
    def step_ms(self) -> float | None:
        """Median time of a step; the first, which warms up, is left out where there are others."""
        seconds = self.step_seconds[1:] or self.step_seconds
        return 1000 * statistics.median(seconds) if seconds else None


def _rate(number: float | torch.Tensor, seconds: list[float]) -> float:
    return float(number) / sum(seconds) if seconds else 0.0


def _clock_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


class ProgressReporter(TrainerCallback):
    """Shows loss, speed and memory of the main process; the meter must be called before it."""

    def __init__(self, console: Console, meter: Meter) -> None:
        self._console = console
        self._meter = meter
        self._progress: Progress | None = None
        self._numbers: dict[str, float] = {}

    def on_train_begin(self, args: Any, state: Any, *_: Any, **__: Any) -> None:
        """Show an empty bar."""
        if not self._console.is_terminal or self._console.quiet or args.disable_tqdm:
            return
        self._progress = Progress(
            TextColumn("step {task.completed:.0f}/{task.total:.0f}"),
            BarColumn(),
            TextColumn("{task.description}"),
            TimeRemainingColumn(),
            console=self._console,
        )
        self._progress.start()
        self._progress.add_task("", total=state.max_steps, completed=state.global_step)

    def on_step_end(self, args: Any, state: Any, *_: Any, **__: Any) -> None:
        """Move the bar."""
        if self._progress is not None:
            self._progress.update(
                self._progress.task_ids[0], completed=state.global_step, description=self._status()
            )

    def on_log(
        self,
        args: Any,
        state: Any,
        control: Any,
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        """Take over the newest losses; without a bar, print about 20 lines per run."""
        logs = logs or {}
        # The loss of reinforcement learning says nothing of the rewards, and is about 0.
        if shown := next((key for key in ("reward", "loss") if logs.get(key) is not None), None):
            self._numbers = {shown: logs[shown]}
        every = max(1, state.max_steps // _NUM_LINES)
        if "eval_loss" in logs:
            known = {key: text for key, text in _SAID.items() if logs.get(key) is not None}
            found = [text.format(logs[key]) for key, text in known.items()]
            if "eval_reward" not in known:
                found.insert(0, f"loss {logs['eval_loss']:.4f}")
            said = f"evaluation {', '.join(found)}"
        elif (
            "loss" in logs
            and self._progress is None
            and (state.global_step % every == 0 or state.global_step == 1)
        ):
            said = self._status()
        else:
            return
        step = f"step {state.global_step}/{state.max_steps}"
        say(self._console, f"{step}: {said}")

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        """Leave the bar where it is."""
        self.close()

    def close(self) -> None:
        """Give the terminal back, also when training failed."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def _status(self) -> str:
        memory = format_bytes(peak_memory_bytes()[0])
        meter = self._meter
        speed = f"{meter.current_rate:,.0f} {meter.unit}/s  peak {memory}"
        return "  ".join([*(f"{key} {value:.4f}" for key, value in self._numbers.items()), speed])


def peak_memory_bytes() -> tuple[int, str]:
    """Return the peak memory and what it is: of the GPU where there is one, else of the process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated(), "cuda_max_memory_allocated"
    return peak_process_bytes(), "process_peak_resident"


def main_console(config: RunConfig, console: Console | None) -> Console:
    """Return the console of the main process; the others get one that prints nothing."""
    if config.training.process_index != 0:
        return Console(quiet=True)
    return console or Console()


def say(console: Console, text: str) -> None:
    """Print a line as it is, however long."""
    console.print(text, soft_wrap=True, highlight=False)


def show_warnings(warnings: list[str], console: Console) -> None:
    """Print each warning on a line of its own."""
    for warning in warnings:
        console.print(Text.assemble(("warning: ", "yellow"), warning), soft_wrap=True)


def show_result(report: Report, what: str, folder: Path, console: Console) -> None:
    """Print the results and where they are."""
    table = Table(show_header=False, box=None)
    for name, value in report.table():
        table.add_row(name, value)
    console.print(table)
    say(console, f"{what}, report and model card are in {folder}")
