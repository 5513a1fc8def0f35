"""Run one measurement in a process of its own, so that memory that ends ends nothing else."""

import gc
import logging
import multiprocessing
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any, cast

import torch
from torch import Tensor

from pacatune import lean
from pacatune.measure.counters import SavedBytes, count_flops, kinds_of_modules
from pacatune.measure.device import PeakMemory, Stopwatch, is_out_of_memory, limit_memory
from pacatune.measure.methods import adapt
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
from pacatune.measure.timing import alternate, summarize
from pacatune.reports.provenance import Noise

# Hints about optional kernels that nobody here asked for.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

PHASES = ("forward", "backward", "optimizer")
Phases = tuple[float, float, float]
_MIN_STEPS_OF_POINT = 3
# What the server imports once that child processes are forked from, so that they start at once.
_PRELOADED = ["pacatune.measure.step", "pacatune.tuner"]


@dataclass(frozen=True)
class Outcome:
    """Result of one measurement, or how memory ended it."""

    value: dict[str, Any] | None
    """What was measured; None where memory ended."""
    reason: str = ""
    """How memory ended."""


def run_in_child(
    measure: Callable[..., dict[str, Any]], config: BenchConfig, *args: Any
) -> Outcome:
    """Call `measure(config, *args)` in a new process; only memory that ends is no error."""
    context = _context(config)
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_serve, args=(sender, measure, config, args))
    process.start()
    sender.close()
    received: Outcome | str | None = None  # a text is the traceback of an error
    try:
        received = receiver.recv()
    except EOFError:
        pass  # it died
    except BaseException:
        process.kill()
        raise
    finally:
        receiver.close()
        process.join()
    if isinstance(received, Outcome):
        return received
    number = -(process.exitcode or 0)
    if received is None and number in _signs_of_memory(config):
        return Outcome(None, f"the process was ended by {signal.Signals(number).name}")
    detail = received or f"exit status {process.exitcode}"
    raise RuntimeError(f"a measurement failed: {measure.__name__}{args}: {detail}")


def _signs_of_memory(config: BenchConfig) -> tuple[int, ...]:
    """Signals by which a process ends that takes too much, or cannot go on without memory."""
    if sys.platform == "win32":
        return ()
    limited = (signal.SIGABRT, signal.SIGSEGV) if config.memory_limit is not None else ()
    return (signal.SIGKILL, *limited)


def _context(config: BenchConfig) -> Any:
    """A server that has imported everything forks fast; accelerators must not be forked."""
    if sys.platform != "linux" or config.torch_device.type != "cpu":
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    return context


def _serve(
    sender: Connection,
    measure: Callable[..., dict[str, Any]],
    config: BenchConfig,
    args: tuple[Any, ...],
) -> None:
    warnings.simplefilter("ignore", FutureWarning)  # between the packages that we build on
    try:
        prepare(config)
        if config.memory_limit is not None:
            limit_memory(config.memory_limit, config.torch_device)
        sender.send(Outcome(measure(config, *args)))
    except KeyboardInterrupt:
        return
    except BaseException as error:
        if is_out_of_memory(error):
            sender.send(Outcome(None, " ".join(str(error).split())[:300] or "MemoryError"))
        else:
            sender.send(traceback.format_exc())


def prepare(config: BenchConfig) -> None:
    """Set threads and precision of a process; import what building a model imports."""
    assert config.threads is not None  # settled when the configuration was made
    torch.set_num_threads(config.threads)
    torch.set_float32_matmul_precision("highest")
    if config.torch_device.type != "cpu":
        torch.accelerator.set_device_index(config.torch_device.index or 0)
    from pacatune import tuner  # noqa: F401 (modules in memory are not what training takes)

    make_skeleton(make_config(config.values), config.title, config.weight_dtype)


class _Run:
    """A contender with its batch on the device, ready to step."""

    def __init__(self, config: BenchConfig, setting: MicroBatch, method: str) -> None:
        self.config, self.device = config, config.torch_device
        model = make_model(
            config.values,
            config.weight_dtype,
            self.device,
            seed=config.seed,
            quantization=quantization_of(method),
            max_length=setting.num_tokens,
        )
        self.contender = adapt(
            model,
            method,
            rank=config.rank,
            dropout=config.dropout,
            seed=config.seed,
            adapter_dtype=config.trained_dtype,
        )
        if config.lean_level:
            lean.enable(self.contender.model, level=config.lean_level)
        if config.gradient_checkpointing:
            checkpoint_blocks(model)
        if config.compiled:
            self.contender.model.compile(dynamic=False)
        vocab_size = cast(Any, model).config.get_text_config().vocab_size
        batch = make_batch(setting.num_rows, setting.num_tokens, vocab_size, config.seed)
        self._batch = batch.to(self.device)

    def forward(self) -> Tensor:
        """Return the loss."""
        model = self.contender.model
        run = loss_of_graph if self.config.compiled else loss_of
        with self._precision():
            return run(model, self._batch)

    def _precision(self) -> AbstractContextManager[Any]:
        """Products of 16-bit weights and finer adapters need autocast."""
        weights = self.config.weight_dtype
        if self.config.trained_dtype == weights:
            return nullcontext()
        return torch.autocast(self.device.type, weights)

    def step(self) -> Phases:
        """Make a training step; return the seconds of forward, backward and optimizer.

        The device is not waited for between them: it works through a step as in training, and who
        launches ahead of it does so here as well.
        """
        optimizer, watch = self.contender.optimizer, Stopwatch(self.device)
        watch.mark()
        loss = self.forward()
        watch.mark()
        loss.backward()
        watch.mark()
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad()
        watch.mark()
        return cast(Phases, watch.seconds())


def count(config: BenchConfig, setting: MicroBatch, method: str) -> dict[str, Any]:
    """Return what needs no clock: peak memory, bytes kept by kind of module, operations."""
    run, peak = _run_and_peak(config, setting, method)
    model = run.contender.model
    counted = {
        "num_parameters": sum(parameter.numel() for parameter in model.parameters()),
        "num_trainable_parameters": run.contender.num_trainable_parameters,
        **peak,
    }
    # A compiled graph runs no hooks of modules; its kernels are no products that can be counted.
    kinds = {} if config.compiled else kinds_of_modules(model)
    with SavedBytes(model, kinds) as saved:
        loss = run.forward()
    by_kind = saved.num_bytes_by_kind
    counted["saved_bytes"] = saved.num_bytes
    del loss
    if not config.compiled:
        rest = saved.num_bytes - sum(by_kind.values())
        counted["saved_bytes_by_kind"] = by_kind | {"other": rest}
        counted |= count_flops(run.forward)
    return counted


def _run_and_peak(
    config: BenchConfig, setting: MicroBatch, method: str
) -> tuple[_Run, dict[str, Any]]:
    """Return a contender that has made its first steps, and the most memory that these took."""
    memory = PeakMemory(config.torch_device)
    run = _Run(config, setting, method)
    run.step()  # makes the optimizer's state
    gc.collect()
    memory.reset()
    run.step()
    run.step()
    return run, memory.to_dict()


def time_together(
    config: BenchConfig, setting: MicroBatch, methods: tuple[str, ...]
) -> dict[str, Any]:
    """Let methods take turns; return the seconds of each phase, method and round, and the noise."""
    runs = {method: _Run(config, setting, method).step for method in methods}
    noise = Noise()
    phases = alternate(
        runs, seconds=config.seconds, min_rounds=config.min_rounds, num_warmup=config.warmup
    )
    return {"phases": phases, "noise": noise.to_dict()}


def run_point(config: BenchConfig, setting: MicroBatch, method: str) -> dict[str, Any]:
    """Return time and memory of one point of a sweep; without rounds, only whether it fits."""
    run, peak = _run_and_peak(config, setting, method)
    if config.sweep == "seq-len":
        return peak
    times: list[float] = []
    noise = Noise()
    end = time.monotonic() + config.seconds
    while len(times) < _MIN_STEPS_OF_POINT or time.monotonic() < end:
        times.append(1e3 * sum(run.step()))
    step = summarize(times, "step_ms")
    found = {**peak, **step, "num_steps": len(times), "noise": [noise.to_dict()]}
    return found | setting.rates(step["step_ms"])
