"""One timed training step, and measurements in processes of their own.

Memory that ends in a process ends nothing else.
"""

import gc
import logging
import multiprocessing
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from pacatune import lean
from pacatune.measure.counters import SavedBytes, count_flops, kinds_of_modules
from pacatune.measure.device import PeakMemory, Stopwatch, is_out_of_memory, limit_memory
from pacatune.measure.methods import Contender, adapt
from pacatune.measure.models import (
    checkpoint_blocks,
    loss_of,
    loss_of_graph,
    make_batch,
    make_config,
    make_model,
    make_skeleton,
)
from pacatune.measure.setting import BenchConfig, MicroBatch, quantization_of
from pacatune.measure.timing import alternate, ratio_row, time_row
from pacatune.reports.rows import Row

# Hints about optional kernels that nobody here asked for.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

PHASES = ("forward", "backward", "optimizer")
Phases = tuple[float, float, float]
_MIN_STEPS_OF_POINT = 3
# What the server imports once that child processes are forked from, so that they start at once.
_PRELOADED = ["pacatune.measure.step", "pacatune.tuner"]
_T = TypeVar("_T")


@dataclass(frozen=True, kw_only=True)
class Step:
    """One optimizer step of a contender on one batch; a call makes it, and times its phases.

    `timing.alternate` takes steps as its runs, so a comparison is:

        contender = adapt(model, "paca", rank=8, seed=0)
        step = Step(contender=contender, batch=batch)
        times = alternate({"paca": step, "lora": other}, seconds=10, min_rounds=5, num_warmup=2)

    `step.seconds` is a run as well, of the whole step without its phases.

    Where the device is waited for, `device.Stopwatch` says: on CUDA at the end of the step alone.
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
    clock: Callable[[], float] = time.perf_counter
    """What is read where the device notes no events, such as `time.process_time`."""

    def forward(self) -> Tensor:
        """Return the loss."""
        device = next(self.contender.model.parameters()).device.type
        precision: AbstractContextManager[Any] = nullcontext()
        if self.autocast is not None:
            precision = torch.autocast(device, self.autocast)
        with precision:
            return self.loss(self.contender.model, self.batch)

    def __call__(self) -> Phases:
        """Make the step; return the seconds of forward, backward and optimizer."""
        optimizer = self.contender.optimizer
        watch = Stopwatch(next(self.contender.model.parameters()).device, self.clock)
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


def run_in_child(measure: Callable[..., _T], config: BenchConfig, *args: Any) -> _T:
    """Return `measure(config, *args)` of a new process.

    Raises:
        MemoryError: If memory ended, or the system ended the process as where it ends.
        RuntimeError: If the process ended otherwise, besides what `measure` raises.
    """
    others = {*multiprocessing.active_children()}
    with ProcessPoolExecutor(1, _context(config)) as pool:
        ready = pool.submit(prepare, config)
        (process,) = {*multiprocessing.active_children()} - others
        try:
            ready.result()
            return pool.submit(measure, config, *args).result()
        except BrokenProcessPool as error:
            process.join()
            # Allocations that fail in libraries abort the process, or are written to.
            limited = (signal.SIGABRT, signal.SIGSEGV) if config.memory_limit is not None else ()
            if -(process.exitcode or 0) not in (signal.SIGKILL, *limited):
                status = f"exit status {process.exitcode}"
                raise RuntimeError(f"the process of a measurement ended with {status}") from error
            raise MemoryError("the system ended the process, as where memory ends") from error
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            raise MemoryError(" ".join(str(error).split())[:300] or "out of memory") from error


def _context(config: BenchConfig) -> Any:
    """A server that has imported everything forks fast; accelerators must not be forked."""
    if sys.platform != "linux" or config.torch_device.type != "cpu":
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    return context


def prepare(config: BenchConfig) -> None:
    """Set up a process for measurements; import what building a model imports."""
    warnings.simplefilter("ignore", FutureWarning)  # between the packages that we build on
    assert config.threads is not None  # settled when the configuration was made
    torch.set_num_threads(config.threads)
    torch.set_float32_matmul_precision("highest")
    if config.torch_device.type != "cpu":
        torch.accelerator.set_device_index(config.torch_device.index or 0)
    from pacatune import tuner  # noqa: F401 (modules in memory are not what training takes)

    make_skeleton(make_config(config.values), config.title, config.weight_dtype)
    if config.memory_limit is not None:
        limit_memory(config.memory_limit, config.torch_device)


def make_step(config: BenchConfig, setting: MicroBatch, method: str) -> Step:
    """Return the step of a method with its model and batch on the device."""
    model: Any = make_model(
        config.values,
        config.weight_dtype,
        config.torch_device,
        seed=config.seed,
        quantization=quantization_of(method),
        max_length=setting.num_tokens,
    )
    contender = adapt(
        model,
        method,
        rank=config.rank,
        dropout=config.dropout,
        seed=config.seed,
        adapter_dtype=config.trained_dtype,
    )
    if config.lean_level:
        lean.enable(contender.model, level=config.lean_level)
    if config.gradient_checkpointing:
        checkpoint_blocks(model)
    if config.compiled:
        contender.model.compile(dynamic=False)
    vocab_size = model.config.get_text_config().vocab_size
    batch = make_batch(setting.num_rows, setting.num_tokens, vocab_size, config.seed)
    return Step(
        contender=contender,
        batch=batch.to(config.torch_device),
        loss=loss_of_graph if config.compiled else loss_of,
        autocast=None if config.trained_dtype == config.weight_dtype else config.weight_dtype,
    )


def count(config: BenchConfig, setting: MicroBatch, method: str) -> list[Row]:
    """Return what needs no clock: peak memory, bytes kept by kind of module, operations."""
    step, peaks = _step_and_peaks(config, setting, method)
    model = step.contender.model
    # A compiled graph runs no hooks of modules; its kernels are no products that can be counted.
    kinds = {} if config.compiled else kinds_of_modules(model)
    with SavedBytes(model, kinds) as saved:
        loss = step.forward()
    by_kind = saved.num_bytes_by_kind
    del loss
    kept = {"kept for backward": saved.num_bytes}
    operations: dict[str, int] = {}
    if not config.compiled:
        by_kind["other"] = saved.num_bytes - sum(by_kind.values())
        kept |= {f"kept by {kind}": number for kind, number in by_kind.items()}
        operations = count_flops(step.forward)

    def row(what: str, number: float, unit: str = "") -> Row:
        return _row(config, setting, method, what, number, unit, origin="counted")

    return [
        row("trained parameters", step.contender.num_trainable_parameters),
        *(
            row(f"{name.removesuffix('_flops')} operations", number / 1e9, "GFLOP")
            for name, number in operations.items()
        ),
        *peaks,
        *(row(what, number, "bytes") for what, number in kept.items()),
    ]


def _step_and_peaks(
    config: BenchConfig, setting: MicroBatch, method: str
) -> tuple[Step, list[Row]]:
    """Return a step that has been made, and the most memory that more of them take."""
    memory = PeakMemory(config.torch_device)
    step = make_step(config, setting, method)
    step()  # makes the optimizer's state
    gc.collect()
    memory.reset()
    step()
    step()
    names = {"peak_bytes": "peak", "peak_reserved_bytes": "peak, reserved"}
    peaks = [
        _row(config, setting, method, names[name], number, "bytes")
        for name, number in memory.to_dict().items()
        if number is not None
    ]
    return step, peaks


def time_together(config: BenchConfig, setting: MicroBatch, methods: tuple[str, ...]) -> list[Row]:
    """Let one or two methods take turns; return the times of each, and their ratios."""
    rounds = alternate(
        {method: make_step(config, setting, method) for method in methods},
        seconds=config.seconds,
        min_rounds=config.min_rounds,
        num_warmup=config.warmup,
    )
    phases = {method: [*zip(*times, strict=True)] for method, times in rounds.items()}
    whole = {method: [sum(one) for one in times] for method, times in rounds.items()}
    rows = [row for m in methods for row in time_rows(config, setting, m, whole[m], phases[m])]
    if len(methods) == 2:
        ours, other = methods
        pairs: dict[str, tuple[Any, Any]] = {"step": (whole[ours], whole[other])}
        pairs |= dict(zip(PHASES[:2], zip(phases[ours], phases[other], strict=True), strict=False))
        for what, (above, below) in pairs.items():
            names = {"what": what, "method": f"{ours} / {other}", "model": config.title}
            names["setting"] = setting.label
            rows.append(ratio_row(list(above), list(below), seed=config.seed, **names))
    return rows


def time_rows(
    config: BenchConfig,
    setting: MicroBatch,
    method: str,
    steps: list[float],
    phases: Iterable[Iterable[float]] = (),
) -> list[Row]:
    """Return medians and quartiles of phases and steps, given in seconds, and of the throughput."""
    rows = []
    for what, seconds in [*zip(PHASES, phases, strict=False), ("step", steps)]:
        names = {"method": method, "model": config.title, "setting": setting.label}
        rows.append(time_row(list(seconds), what=what, **names))
    step, per_step = rows[-1], 1e3 * setting.num_rows
    unit = "sentences/s"
    if config.sweep is None:
        per_step, unit = per_step * setting.num_tokens, "tokens/s"
    low, high = (per_step / cast(float, end) for end in (step.high, step.low))
    rate = per_step / step.value
    spread = {"low": low, "high": high, "n": step.n}
    return [*rows, _row(config, setting, method, "throughput", rate, unit, **spread)]


def run_point(config: BenchConfig, setting: MicroBatch, method: str) -> list[Row]:
    """Return memory and time of one point of a sweep; over lengths the memory alone."""
    step, peaks = _step_and_peaks(config, setting, method)
    if config.sweep == "seq-len":
        return peaks
    times: list[float] = []
    end = time.monotonic() + config.seconds
    while len(times) < _MIN_STEPS_OF_POINT or time.monotonic() < end:
        times.append(sum(step()))
    return [*time_rows(config, setting, method, times), *peaks]


def _row(
    config: BenchConfig,
    setting: MicroBatch,
    method: str,
    what: str,
    value: float,
    unit: str,
    **more: Any,
) -> Row:
    more |= {"model": config.title, "setting": setting.label}
    return Row(what=what, method=method, value=value, unit=unit, **more)
