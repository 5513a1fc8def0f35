"""What a GPU is measured to do: its ceilings, training steps of every method, lean and compiled.

    tools/gpu_check.py runs it.

Contenders are on the device together and take turns, a whole step each: its time is between two
events on CUDA, and by the clock elsewhere. Ratios are those of the medians.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.utils.benchmark import Timer

from benchmarks.gpu_promises import SEED, SMALL, Found, backend_on, free, hold
from benchmarks.kernels import QUANTISED
from benchmarks.lean import LAYER
from benchmarks.methods import OURS, SWAP, make_contender
from benchmarks.results import DTYPES, compare, counted, take_turns
from pacatune import lean
from pacatune.lean import fused
from pacatune.measure.counters import SavedBytes
from pacatune.measure.models import loss_of_graph, make_batch
from pacatune.measure.setting import MicroBatch
from pacatune.measure.step import Step
from pacatune.reports.rows import Row

METHODS = ("frozen", OURS, SWAP, "lora", "lora_dropout", "dora")
PAIRS = [(OURS, other) for other in METHODS if other != OURS] + [QUANTISED]


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """How large what is measured is, and for how long."""

    values: dict[str, Any]
    batches: tuple[MicroBatch, ...]
    seconds: float
    """For each comparison, warm-up excluded."""
    warmup: int
    gemm: int
    """Rows and columns of the matrices that are multiplied."""
    min_rounds: int = 3

    def batch(self, size: MicroBatch, device: torch.device) -> Tensor:
        """Return tokens."""
        tokens = make_batch(size.num_rows, size.num_tokens, self.values["vocab_size"], SEED)
        return tokens.to(device)


GPU = Sizes(
    values=LAYER | {"num_hidden_layers": 8, "vocab_size": 32000},
    batches=tuple(MicroBatch(num_rows=n, num_tokens=t) for n, t in ((2, 512), (8, 512), (1, 8192))),
    seconds=8.0,
    warmup=3,
    gemm=8192,
)
TINY = Sizes(
    values=SMALL,
    batches=(MicroBatch(num_rows=1, num_tokens=16),),
    seconds=0.0,
    warmup=1,
    gemm=64,
)


def measure_ceilings(device: torch.device, sizes: Sizes) -> Found:
    """Measure what the device does at best, beside which steps are to be seen."""
    a = torch.randn(sizes.gemm, sizes.gemm, device=device).bfloat16()
    thin = torch.randn(sizes.gemm, 16, device=device).bfloat16()
    source = torch.zeros(16 * a.numel(), dtype=torch.uint8, device=device)
    tensors = {"a": a, "thin": thin, "source": source, "target": torch.empty_like(source)}
    tensors["one"] = torch.zeros(1, device=device)

    def seconds(statement: str, number: int = 10) -> float:
        timer = Timer(statement, globals=tensors)  # waits for the device
        timer.timeit(3)
        return timer.timeit(number).mean

    return {
        "gemm_tflops": 2e-12 * sizes.gemm**3 / seconds("a @ a"),
        "thin_gemm_tbps": 1e-12 * 2 * (a.numel() + 2 * thin.numel()) / seconds("a.t() @ thin"),
        "copy_tbps": 1e-12 * 2 * source.numel() / seconds("target.copy_(source)"),
        "launch_us": 1e6 * seconds("one.add_(1)", 2000),
    }


def _step(method: str, values: dict[str, Any], batch: Tensor, dtype: str, **more: Any) -> Step:
    """Return a method's step on a model of its own in bfloat16; finer adapters run in autocast."""
    contender = make_contender(
        method, values, torch.bfloat16, SEED, batch.device, adapter_dtype=DTYPES[dtype]
    )
    autocast = None if dtype == "bfloat16" else torch.bfloat16
    return Step(contender=contender, batch=batch, autocast=autocast, **more)


def _times(
    steps: Mapping[str, Step], pairs: Iterable[tuple[str, str]], sizes: Sizes, setting: str
) -> list[Row]:
    """Return rows of each step and of the ratios of pairs that are there."""
    times = take_turns({name: step.seconds for name, step in steps.items()}, sizes)
    known = [pair for pair in pairs if steps.keys() >= {*pair}]
    return compare(times, SEED, known, setting=setting)


def _found(rows: list[Row], **more: Any) -> Found:
    return {**more, "rows": [row.to_dict() for row in rows]}


def measure_steps(device: torch.device, sizes: Sizes) -> Found:
    """Time training steps of the methods, with adapters in both dtypes."""
    methods = [*METHODS, *(QUANTISED if find_spec("bitsandbytes") is not None else ())]
    rows: list[Row] = []
    for dtype in ("bfloat16", "float32"):
        first = sizes.batch(sizes.batches[0], device)
        steps = {name: _step(name, sizes.values, first, dtype) for name in methods}
        for size in sizes.batches:
            batch = sizes.batch(size, device)
            own = {name: replace(step, batch=batch) for name, step in steps.items()}
            rows += _times(own, PAIRS, sizes, f"{size.label}, {dtype} adapters")
        del steps, own
        free(device)
    return _found(rows, methods=methods)


def measure_lean(device: torch.device, sizes: Sizes) -> Found:
    """Time steps with lean activations and without, and count what a layer keeps."""
    batch, label = sizes.batch(sizes.batches[0], device), sizes.batches[0].label
    short = sizes.values | {"num_hidden_layers": 2}
    rows: list[Row] = []
    failed_before = set(fused._failed)
    for method in (OURS, "lora"):
        both = {
            name: _step(method, short, batch, "bfloat16") for name in (method, f"{method} lean")
        }
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
    batch = sizes.batch(sizes.batches[0], device)
    short = sizes.values | {"num_hidden_layers": 2}
    torch.compiler.reset()
    methods = ("frozen", OURS, "lora")
    steps = {m: _step(m, short, batch, "bfloat16", loss=loss_of_graph) for m in methods}
    for step in steps.values():
        step.contender.model.compile(dynamic=False, backend=backend_on(device))
    rows = _times(steps, PAIRS, sizes, sizes.batches[0].label)
    torch.compiler.reset()
    return _found(rows, backend=backend_on(device))
