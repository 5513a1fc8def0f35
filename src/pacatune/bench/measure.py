"""What child processes measure: one setting of one method or pair, from model to numbers."""

import gc
import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import torch
from torch import Tensor

from pacatune.bench.config import BenchConfig, Setting
from pacatune.bench.device import PeakMemory, synchronize
from pacatune.bench.flops import count_flops
from pacatune.bench.methods import Contender, adapt, quantization_of
from pacatune.bench.model import make_batch, make_model, make_skeleton
from pacatune.bench.record import Noise
from pacatune.bench.saved import SavedByLayer, kinds_of_modules
from pacatune.bench.timing import alternate

__all__ = ["PHASES", "count", "run_point", "time_together"]

PHASES = ("forward", "backward", "optimizer")
_MIN_STEPS_OF_POINT = 3
Phases = tuple[float, float, float]


class _Run:
    """A contender with its batch on the device, ready to step."""

    def __init__(self, config: BenchConfig, setting: Setting, method: str) -> None:
        self.config, self.device = config, config.torch_device
        model = make_model(
            config.values,
            config.weight_dtype,
            self.device,
            seed=config.seed,
            quantization=quantization_of(method),
            max_length=setting.num_tokens,
        )
        self.contender: Contender = adapt(
            model,
            method,
            rank=config.rank,
            dropout=config.dropout,
            seed=config.seed,
            adapter_dtype=config.trained_dtype,
        )
        vocab_size = cast(Any, model).config.get_text_config().vocab_size
        batch = make_batch(setting.num_rows, setting.num_tokens, vocab_size, config.seed)
        self._batch = batch.to(self.device)

    def compile(self) -> None:
        """Let the model run as torch.compile makes it, if the run is of compiled models."""
        if self.config.compiled:
            self.contender.model.compile(dynamic=False)

    def forward(self) -> Tensor:
        """Return the loss."""
        with self._precision():
            loss: Tensor = self.contender.model(input_ids=self._batch, labels=self._batch).loss
        return loss

    def _precision(self) -> AbstractContextManager[Any]:
        if not self.config.needs_autocast:
            return nullcontext()
        return torch.autocast(self.device.type, self.config.weight_dtype)

    def step(self) -> Phases:
        """Make a training step; return the seconds of forward, backward and optimizer."""
        optimizer = self.contender.optimizer
        synchronize(self.device)
        start = time.perf_counter()
        loss = self.forward()
        synchronize(self.device)
        forward = time.perf_counter()
        loss.backward()
        synchronize(self.device)
        backward = time.perf_counter()
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad()
            synchronize(self.device)
        return forward - start, backward - forward, time.perf_counter() - backward


def prepare(config: BenchConfig) -> None:
    """Set threads and precision of a process; import what building a model imports."""
    torch.set_num_threads(config.threads)
    torch.set_float32_matmul_precision("highest")
    if config.torch_device.type != "cpu":
        torch.accelerator.set_device_index(config.torch_device.index or 0)
    import peft  # noqa: F401 (modules in memory are not what training takes)

    from pacatune import tuner  # noqa: F401 (as above)

    make_skeleton(config.values, config.weight_dtype)


def count(config: BenchConfig, setting: Setting, method: str) -> dict[str, Any]:
    """Return what needs no clock: peak memory, bytes kept by kind of module, operations."""
    memory = PeakMemory(config.torch_device)
    run = _Run(config, setting, method)
    run.compile()
    peak = _measure_peak(run, memory)
    model = run.contender.model
    counted = {
        "num_parameters": sum(parameter.numel() for parameter in model.parameters()),
        "num_trainable_parameters": run.contender.num_trainable_parameters,
        **peak,
    }
    # A compiled graph runs no hooks of modules; its kernels are no products that can be counted.
    kinds = {} if config.compiled else kinds_of_modules(model)
    with SavedByLayer(model, kinds) as saved:
        loss = run.forward()
    by_kind = saved.num_bytes_by_kind
    counted["saved_bytes"] = saved.num_bytes
    if not config.compiled:
        rest = saved.num_bytes - sum(by_kind.values())
        counted["saved_bytes_by_kind"] = by_kind | {"other": rest}
    del loss, saved
    if not config.compiled:
        counted |= count_flops(run.forward, lambda loss: cast(None, loss.backward()))
    return counted


def _measure_peak(run: _Run, memory: PeakMemory) -> dict[str, Any]:
    run.step()  # makes the optimizer's state
    gc.collect()
    memory.reset()
    run.step()
    run.step()
    return memory.to_dict()


def time_together(
    config: BenchConfig, setting: Setting, methods: tuple[str, ...]
) -> dict[str, Any]:
    """Let methods take turns; return the seconds of each phase, method and round, and the noise."""
    runs: dict[str, Callable[[], Phases]] = {}
    for method in methods:
        run = _Run(config, setting, method)
        run.compile()
        runs[method] = run.step
    noise = Noise()
    phases = alternate(
        runs, seconds=config.seconds, min_rounds=config.min_rounds, num_warmup=config.warmup
    )
    return {"phases": phases, "noise": noise.to_dict()}


def run_point(config: BenchConfig, setting: Setting, method: str) -> dict[str, Any]:
    """Return time and memory of one point of a sweep; without rounds, only whether it fits."""
    memory = PeakMemory(config.torch_device)
    run = _Run(config, setting, method)
    run.compile()
    peak = _measure_peak(run, memory)
    if config.sweep == "seq-len":
        return peak
    seconds: list[float] = []
    noise = Noise()
    end = time.monotonic() + config.seconds
    while len(seconds) < _MIN_STEPS_OF_POINT or time.monotonic() < end:
        seconds.append(sum(run.step()))
    step = statistics.median(seconds)
    return {
        **peak,
        "step_ms": 1e3 * step,
        "num_steps": len(seconds),
        "noise": [noise.to_dict()],
        "sentences_per_second": setting.num_rows / step,
        "tokens_per_second": setting.num_rows * setting.num_tokens / step,
    }
