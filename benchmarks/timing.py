"""Time training steps in turns: all contenders alternate, so that noise hits all alike."""

import gc
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.models import loss_of
from pacatune.measure.counters import SavedBytes
from pacatune.reports.rows import Row

Times = list[float]
_NUM_RESAMPLES = 2000
_NUM_ROUNDS_PER_COLLECTION = 10


@dataclass(frozen=True)
class Contender:
    """A model ready to be trained by one method."""

    method: str
    model: nn.Module
    optimizer: torch.optim.Optimizer | None

    @property
    def num_trainable_parameters(self) -> int:
        """Number of trained values."""
        return sum(p.numel() for p in self.model.parameters() if p.requires_grad)


@dataclass(frozen=True, kw_only=True)
class Step:
    """One optimizer step of a contender on one batch; a call makes it, and times its phases.

    `alternate` takes steps as its runs, and `step.seconds`, the whole step without its phases. On
    CUDA the device is waited for at the end of the step alone.
    """

    contender: Contender
    batch: Any
    """What `loss` takes beside the model, on the model's device: tokens, or images and classes."""
    loss: Callable[[nn.Module, Any], Tensor] = loss_of
    """Returns the loss of a model on the batch; by default of (B, T) tokens."""
    accumulation: int = 1
    """Micro-batches per optimizer step."""
    autocast: torch.dtype | None = None
    """Dtype of the products, where adapters are finer than the weights."""

    def forward(self) -> Tensor:
        """Return the loss."""
        device = next(self.contender.model.parameters()).device.type
        precision: AbstractContextManager[Any] = nullcontext()
        if self.autocast is not None:
            precision = torch.autocast(device, self.autocast)
        with precision:
            return self.loss(self.contender.model, self.batch)

    def kept_bytes(self) -> int:
        """Return the bytes that autograd keeps of a forward pass, parameters and buffers aside."""
        with SavedBytes(self.contender.model) as saved:
            loss = self.forward()  # what it keeps goes with it
        del loss
        return saved.num_bytes

    def __call__(self) -> tuple[float, float, float]:
        """Make the step; return the seconds of forward, backward and optimizer."""
        optimizer = self.contender.optimizer
        watch = Stopwatch(next(self.contender.model.parameters()).device)
        watch.mark()
        for _ in range(self.accumulation):
            loss = self.forward()
            watch.mark()
            loss.backward()
            watch.mark()
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad()
        watch.mark()
        *passes, last = watch.seconds()
        return sum(passes[::2]), sum(passes[1::2]), last

    def seconds(self) -> float:
        """Make the step; return its seconds in all."""
        return sum(self())


class Stopwatch:
    """Notes moments in the work of a CPU, or of CUDA by events: nothing waits but `seconds`."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._marks: list[Any] = []

    def mark(self) -> None:
        """Note that everything given to the device so far is done."""
        if self._device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record(torch.cuda.current_stream(self._device))
            self._marks.append(event)
        else:
            self._marks.append(time.perf_counter())

    def seconds(self) -> tuple[float, ...]:
        """Wait for the last mark; return the time between each mark and the next."""
        pairs = zip(self._marks, self._marks[1:], strict=False)
        if self._device.type != "cuda":
            return tuple(end - start for start, end in pairs)
        self._marks[-1].synchronize()
        return tuple(1e-3 * start.elapsed_time(end) for start, end in pairs)


def order_of_round(num: int, round_: int) -> list[int]:
    """Return who goes when: over `2 * num` rounds, everybody follows everybody equally often.

    A plain rotation would let each contender always find the caches as the same other one left
    them. This is Williams' design: 0, n-1, 1, n-2, ... shifted by the round, odd rounds reversed.
    """
    zigzag = [i // 2 if i % 2 == 0 else num - (i + 1) // 2 for i in range(num)]
    order = [(place + round_ // 2) % num for place in zigzag]
    return order[::-1] if round_ % 2 else order


def alternate(
    runs: dict[str, Callable[[], Any]], *, seconds: float, min_rounds: int, num_warmup: int
) -> dict[str, list[Any]]:
    """Let every contender run once per round until the time is up; return what each measured.

    The warm-up is not in the time, and `min_rounds` are made however long they take.
    """
    names = list(runs)
    measured: dict[str, list[Any]] = {name: [] for name in names}
    with _without_gc():
        for round_ in range(num_warmup):
            for i in order_of_round(len(names), round_):
                runs[names[i]]()
        end, round_ = time.monotonic() + seconds, 0
        while round_ < min_rounds or time.monotonic() < end:
            for i in order_of_round(len(names), round_):
                measured[names[i]].append(runs[names[i]]())
            round_ += 1
            if round_ % _NUM_ROUNDS_PER_COLLECTION == 0:
                gc.collect()
    return measured


@contextmanager
def _without_gc() -> Iterator[None]:
    was_enabled = gc.isenabled()
    gc.collect()
    gc.freeze()  # the collections between rounds need not visit the models
    gc.disable()
    try:
        yield
    finally:
        gc.unfreeze()
        if was_enabled:
            gc.enable()


def time_row(times: Times, **names: Any) -> Row:
    """Return the median of times in seconds as a row in milliseconds, with the quartiles.

    Args:
        times: Of each round.
        **names: `what`, `method` and other fields of the row.
    """
    low, median, high = (
        statistics.quantiles(times, n=4, method="inclusive") if times[1:] else times * 3
    )
    return Row(value=1e3 * median, low=1e3 * low, high=1e3 * high, unit="ms", n=len(times), **names)


def ratio_row(times: Times, reference: Times, *, seed: int, **names: Any) -> Row:
    """Return the ratio of two contenders' medians as a row, and how sure it is.

    Both have times of the same rounds. `low` and `high` bound the 95 % interval of a bootstrap that
    draws rounds: what disturbed one round disturbed both.

    Args:
        times: Of each round, seconds.
        reference: The same of the other contender.
        seed: Of the draws.
        **names: `what`, `method` and other fields of the row.
    """
    both = torch.tensor([times, reference], dtype=torch.float64, device="cpu")
    generator = torch.Generator().manual_seed(seed)
    size = (_NUM_RESAMPLES, len(times))
    draws = torch.randint(len(times), size, generator=generator, device="cpu")
    medians = both[:, draws].quantile(0.5, dim=-1)
    low, high = (medians[0] / medians[1]).quantile(both.new_tensor([0.025, 0.975])).tolist()
    ratio = statistics.median(times) / statistics.median(reference)
    return Row(value=ratio, low=low, high=high, unit="ratio", n=len(times), **names)
