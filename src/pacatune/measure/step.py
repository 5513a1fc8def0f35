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
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from pacatune import lean
from pacatune.measure.counters import SavedBytes, count_flops, kinds_of_modules
from pacatune.measure.device import PeakMemory, Stopwatch, limit_memory
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
from pacatune.measure.setting import METHODS, BenchConfig, MicroBatch
from pacatune.measure.timing import alternate, ratio_row, time_row
from pacatune.precision import is_out_of_memory, torch_dtype
from pacatune.reports.rows import Row

# Hints about optional kernels that nobody here asked for.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

PHASES = ("forward", "backward", "optimizer")
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

    def __call__(self) -> tuple[float, float, float]:
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
            # Its own thread asks for the exit status, which comes but once; then it is known.
            pool.shutdown()
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

    make_skeleton(make_config(config.values), config.title, torch_dtype(config.dtype))
    if config.memory_limit is not None:
        limit_memory(config.memory_limit, config.torch_device)


def make_step(config: BenchConfig, setting: MicroBatch, method: str) -> Step:
    """Return the step of a method with its model and batch on the device."""
    dtype = torch_dtype(config.dtype)
    is_same = config.adapter_dtype in ("same", config.dtype)
    model: Any = make_model(
        config.values,
        dtype,
        config.torch_device,
        seed=config.seed,
        quantization=METHODS[method].quantization,
        max_length=setting.num_tokens,
    )
    contender = adapt(
        model,
        method,
        rank=config.rank,
        dropout=config.dropout,
        seed=config.seed,
        adapter_dtype=dtype if is_same else torch_dtype(config.adapter_dtype),
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
        autocast=None if is_same else dtype,
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

    names: dict[str, Any] = {**_names(config, setting, method), "origin": "counted"}
    return [
        Row(what="trained parameters", value=step.contender.num_trainable_parameters, **names),
        *(
            Row(what=f"{name} operations", value=number / 1e9, unit="GFLOP", **names)
            for name, number in operations.items()
        ),
        *peaks,
        *(Row(what=what, value=number, unit="bytes", **names) for what, number in kept.items()),
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
    names: dict[str, Any] = {**_names(config, setting, method), "unit": "bytes"}
    peaks = zip(("peak", "peak, reserved"), memory.to_dict().values(), strict=False)
    return step, [Row(what=what, value=peak, **names) for what, peak in peaks if peak is not None]


def time_together(config: BenchConfig, setting: MicroBatch, methods: tuple[str, ...]) -> list[Row]:
    """Let one or two methods take turns; return the times of each, and their ratios."""
    rounds = alternate(
        {method: make_step(config, setting, method) for method in methods},
        seconds=config.seconds,
        min_rounds=config.min_rounds,
        num_warmup=config.warmup,
    )
    series = {method: _series(times) for method, times in rounds.items()}
    rows = [row for method in methods for row in time_rows(config, setting, method, series[method])]
    if len(methods) == 2:
        names = _names(config, setting, " / ".join(methods))
        for what in ("step", *PHASES[:2]):
            ours, other = (series[method][what] for method in methods)
            rows.append(ratio_row(ours, other, seed=config.seed, what=what, **names))
    return rows


def _series(times: list[tuple[float, float, float]]) -> dict[str, list[float]]:
    """Return the seconds of each phase, and of the whole step, over the rounds."""
    phases = zip(PHASES, map(list, zip(*times, strict=True)), strict=True)
    return {**dict(phases), "step": [sum(one) for one in times]}


def time_rows(
    config: BenchConfig, setting: MicroBatch, method: str, series: dict[str, list[float]]
) -> list[Row]:
    """Return medians and quartiles of seconds, and of the throughput; the last are of the step."""
    names: dict[str, Any] = _names(config, setting, method)
    rows = [time_row(seconds, what=what, **names) for what, seconds in series.items()]
    step, per_step = rows[-1], 1e3 * setting.num_rows
    unit = "sentences/s"
    if config.sweep is None:
        per_step, unit = per_step * setting.num_tokens, "tokens/s"
    low, high = (per_step / cast(float, end) for end in (step.high, step.low))
    rate = per_step / step.value
    names |= {"low": low, "high": high, "n": step.n}
    return [*rows, Row(what="throughput", value=rate, unit=unit, **names)]


def run_point(config: BenchConfig, setting: MicroBatch, method: str) -> list[Row]:
    """Return memory and time of one point of a sweep; over lengths the memory alone."""
    step, peaks = _step_and_peaks(config, setting, method)
    if config.sweep == "seq-len":
        return peaks
    rounds = alternate(
        {"step": step.seconds}, seconds=config.seconds, min_rounds=_MIN_STEPS_OF_POINT, num_warmup=0
    )
    return [*time_rows(config, setting, method, rounds), *peaks]


def _names(config: BenchConfig, setting: MicroBatch, method: str) -> dict[str, str]:
    """Return the fields of a row that tell what it is of."""
    return {"method": method, "model": config.title, "setting": setting.label}
