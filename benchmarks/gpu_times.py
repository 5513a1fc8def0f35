"""What a GPU is measured to do: its ceilings, training steps of every method, lean and compiled.

    tools/gpu_check.py runs it.

Contenders are on the device together and take turns, a whole step each: its time is between two
events on CUDA, and by the clock elsewhere. Ratios are those of the medians.
"""

import statistics
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.gpu_promises import SEED, SMALL, Found, backend_on, free, hold
from benchmarks.lean import LAYER
from benchmarks.llama import Shape, make_model
from benchmarks.methods import DROPOUT, OURS, RANK, SWAP, adapt
from benchmarks.results import counted, take_turns
from pacatune import lean
from pacatune.lean import fused
from pacatune.measure.counters import SavedBytes
from pacatune.measure.device import Stopwatch
from pacatune.measure.methods import adapt as adapt_measured
from pacatune.measure.models import loss_of, loss_of_graph, make_batch
from pacatune.measure.setting import MicroBatch
from pacatune.measure.step import Step
from pacatune.measure.timing import alternate
from pacatune.methods import METHODS as TABLE
from pacatune.reports.rows import Row

METHODS = ("frozen", OURS, SWAP, "lora", "lora_dropout", "dora")
QUANTISED = ("qpaca", "qlora")
PAIRS = [(OURS, other) for other in METHODS if other != OURS] + [QUANTISED]


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """How large what is measured is, and for how long."""

    shape: Shape
    batches: tuple[tuple[int, int], ...]
    """Rows and their tokens."""
    seconds: float
    """For each comparison, warm-up excluded."""
    warmup: int
    gemm: int
    """Rows and columns of the matrices that are multiplied."""
    copied_bytes: int
    num_launches: int
    min_rounds: int = 3
    seed: int = SEED


GPU = Sizes(
    shape=replace(LAYER, num_hidden_layers=8, vocab_size=32000),
    batches=((2, 512), (8, 512), (1, 8192)),
    seconds=8.0,
    warmup=3,
    gemm=8192,
    copied_bytes=2**30,
    num_launches=2000,
)
TINY = Sizes(
    shape=replace(SMALL, num_hidden_layers=1),
    batches=((1, 16),),
    seconds=0.0,
    warmup=1,
    gemm=64,
    copied_bytes=2**16,
    num_launches=10,
)


def measure_ceilings(device: torch.device, sizes: Sizes) -> Found:
    """Measure what the device does at best, beside which steps are to be seen."""
    a = torch.randn(sizes.gemm, sizes.gemm, device=device).bfloat16()
    thin = torch.randn(sizes.gemm, 16, device=device).bfloat16()
    source = torch.zeros(sizes.copied_bytes, dtype=torch.uint8, device=device)
    target, one = torch.empty_like(source), torch.zeros(1, device=device)

    def launches() -> None:
        for _ in range(sizes.num_launches):
            one.add_(1)

    seconds = {
        name: _median_seconds(device, run)
        for name, run in {
            "gemm": lambda: a @ a,
            "thin": lambda: a.t() @ thin,
            "copy": lambda: target.copy_(source),
            "launches": launches,
        }.items()
    }
    return {
        "gemm_tflops": 2e-12 * sizes.gemm**3 / seconds["gemm"],
        "thin_gemm_tbps": 1e-12 * 2 * (a.numel() + 2 * thin.numel()) / seconds["thin"],
        "copy_tbps": 1e-12 * 2 * sizes.copied_bytes / seconds["copy"],
        "launch_us": 1e6 * seconds["launches"] / sizes.num_launches,
    }


def _median_seconds(device: torch.device, run: Callable[[], Any]) -> float:
    times = alternate({"": partial(timed, run, device)}, seconds=0.0, min_rounds=10, num_warmup=3)
    return statistics.median(times[""])


def timed(run: Callable[[], Any], device: torch.device) -> float:
    """Return the seconds that the device takes for it."""
    watch = Stopwatch(device)
    watch.mark()
    run()
    watch.mark()
    return watch.seconds()[0]


def _step(
    method: str,
    shape: Shape,
    batch: Tensor,
    adapter_dtype: torch.dtype = torch.bfloat16,
    loss: Callable[[nn.Module, Tensor], Tensor] = loss_of,
) -> Step:
    """Return a method's step on a model of its own in bfloat16; finer adapters run in autocast."""
    quantization = TABLE[method].quantization if method in QUANTISED else None
    model = make_model(shape, torch.bfloat16, SEED, quantization, batch.device)
    if quantization is None:
        contender = adapt(model, method, targets="all-linear", seed=SEED)
    else:
        contender = adapt_measured(model, method, rank=RANK, dropout=DROPOUT, seed=SEED)
    for parameter in contender.model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(adapter_dtype)
    autocast = None if adapter_dtype is torch.bfloat16 else torch.bfloat16
    return Step(contender=contender, batch=batch, loss=loss, autocast=autocast)


def _times(
    steps: Mapping[str, Step], pairs: Iterable[tuple[str, str]], sizes: Sizes, setting: str
) -> list[Row]:
    """Return rows of each step and of the ratios of pairs that are there."""
    runs: Any = {name: step.seconds for name, step in steps.items()}
    known = [pair for pair in pairs if steps.keys() >= {*pair}]
    rows, _ = take_turns(runs, sizes, pairs=known, setting=setting)
    return rows


def _found(rows: list[Row], **more: Any) -> Found:
    return {**more, "rows": [row.to_dict() for row in rows]}


def _batch(sizes: Sizes, size: tuple[int, int], device: torch.device) -> tuple[Tensor, str]:
    """Return tokens, and what they are called."""
    label = MicroBatch(num_rows=size[0], num_tokens=size[1]).label
    return make_batch(*size, sizes.shape.vocab_size, SEED).to(device), label


def measure_steps(device: torch.device, sizes: Sizes) -> Found:
    """Time training steps of the methods, with adapters in both dtypes."""
    methods = [*METHODS, *(QUANTISED if find_spec("bitsandbytes") is not None else ())]
    rows: list[Row] = []
    for dtype in (torch.bfloat16, torch.float32):
        batch, _ = _batch(sizes, sizes.batches[0], device)
        steps = {name: _step(name, sizes.shape, batch, dtype) for name in methods}
        for size in sizes.batches:
            batch, label = _batch(sizes, size, device)
            own = {name: replace(step, batch=batch) for name, step in steps.items()}
            name = str(dtype).removeprefix("torch.")
            rows += _times(own, PAIRS, sizes, f"{label}, {name} adapters")
        del steps, own
        free(device)
    return _found(rows, methods=methods)


def measure_lean(device: torch.device, sizes: Sizes) -> Found:
    """Time steps with lean activations and without, and count what a layer keeps."""
    shape = replace(sizes.shape, num_hidden_layers=min(2, sizes.shape.num_hidden_layers))
    batch, label = _batch(sizes, sizes.batches[0], device)
    rows: list[Row] = []
    failed_before = set(fused._failed)
    for method in (OURS, "lora"):
        both = {method: _step(method, shape, batch), f"{method} lean": _step(method, shape, batch)}
        lean.enable(both[f"{method} lean"].contender.model, mode="require")
        rows += _times(both, [(f"{method} lean", method)], sizes, label)
        for name, step in both.items():
            with SavedBytes(step.contender.model) as saved:
                loss = step.forward()
            del loss
            rows.append(counted("kept for backward", name, saved.num_bytes, "bytes", setting=label))
    failed = ", ".join(function.__name__ for function in fused._failed - failed_before)
    hold(not failed, f"lean kernels could not be compiled: {failed}")
    return _found(rows)


def measure_compiled(device: torch.device, sizes: Sizes) -> Found:
    """Time steps of compiled models."""
    shape = replace(sizes.shape, num_hidden_layers=min(2, sizes.shape.num_hidden_layers))
    batch, label = _batch(sizes, sizes.batches[0], device)
    torch.compiler.reset()
    steps = {m: _step(m, shape, batch, loss=loss_of_graph) for m in ("frozen", OURS, "lora")}
    for step in steps.values():
        step.contender.model.compile(dynamic=False, backend=backend_on(device))
    rows = _times(steps, PAIRS, sizes, label)
    torch.compiler.reset()
    return _found(rows, backend=backend_on(device))
