"""What a GPU is measured to do: its ceilings, training steps of every method, lean and compiled.

    tools/gpu_check.py runs it.

Contenders are on the device together and take turns, a whole step each: its time is between two
events on CUDA, and by the clock elsewhere. Ratios are those of the medians.
"""

from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
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
from pacatune import lean
from pacatune.lean import fused
from pacatune.measure.counters import SavedBytes
from pacatune.measure.device import Stopwatch
from pacatune.measure.methods import Contender
from pacatune.measure.methods import adapt as adapt_measured
from pacatune.measure.models import loss_of, loss_of_graph, make_batch
from pacatune.measure.setting import quantization_of
from pacatune.measure.timing import alternate, compare, summarize

METHODS = ("frozen", OURS, SWAP, "lora", "lora_dropout", "dora")
QUANTISED = ("qpaca", "qlora")
REFERENCES = {OURS: ("frozen", SWAP, "lora", "lora_dropout", "dora"), "qpaca": ("qlora",)}


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
    return summarize(times[""], "s")["s"]


def timed(run: Callable[[], Any], device: torch.device) -> float:
    """Return the seconds that the device takes for it."""
    watch = Stopwatch(device)
    watch.mark()
    run()
    watch.mark()
    return watch.seconds()[0]


def _contender(
    method: str, shape: Shape, device: torch.device, adapter_dtype: torch.dtype
) -> Contender:
    quantization = quantization_of(method) if method in QUANTISED else None
    model = make_model(shape, torch.bfloat16, SEED, quantization, device)
    if quantization is None:
        contender = adapt(model, method, targets="all-linear", seed=SEED)
    else:
        contender = adapt_measured(model, method, rank=RANK, dropout=DROPOUT, seed=SEED)
    for parameter in contender.model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(adapter_dtype)
    return contender


def _step(
    contender: Contender,
    batch: Tensor,
    is_mixed: bool,
    loss: Callable[[nn.Module, Tensor], Tensor] = loss_of,
) -> None:
    autocast = torch.autocast(batch.device.type, torch.bfloat16) if is_mixed else nullcontext()
    with autocast:
        value = loss(contender.model, batch)
    value.backward()
    if contender.optimizer is not None:
        contender.optimizer.step()
        contender.optimizer.zero_grad()


def _take_turns(
    runs: Mapping[str, Callable[[], Any]],
    references: Mapping[str, Iterable[str]],
    device: torch.device,
    sizes: Sizes,
    setting: Found,
) -> tuple[list[Found], list[Found]]:
    """Return a row for each contender, and a ratio for each pair."""
    times = alternate(
        {name: partial(timed, run, device) for name, run in runs.items()},
        seconds=sizes.seconds,
        min_rounds=3,
        num_warmup=sizes.warmup,
    )
    rows = [
        {**setting, "method": name, "num_rounds": len(seconds)}
        | summarize([1e3 * second for second in seconds], "step_ms")
        for name, seconds in times.items()
    ]
    ratios = [
        {**setting, "method": ours, "reference": other}
        | compare(times[ours], times[other], seed=SEED)
        for ours, others in references.items()
        for other in others
        if ours in times and other in times
    ]
    return rows, ratios


def measure_steps(device: torch.device, sizes: Sizes) -> Found:
    """Time training steps of the methods, with adapters in both dtypes."""
    methods = [*METHODS, *(QUANTISED if find_spec("bitsandbytes") is not None else ())]
    rows: list[Found] = []
    ratios: list[Found] = []
    for dtype in (torch.bfloat16, torch.float32):
        contenders = [_contender(name, sizes.shape, device, dtype) for name in methods]
        for num_rows, num_tokens in sizes.batches:
            batch = make_batch(num_rows, num_tokens, sizes.shape.vocab_size, SEED).to(device)
            is_mixed = dtype is torch.float32
            runs = {c.method: partial(_step, c, batch, is_mixed) for c in contenders}
            setting = {
                "adapter_dtype": str(dtype).removeprefix("torch."),
                "num_rows": num_rows,
                "num_tokens": num_tokens,
            }
            found = _take_turns(runs, REFERENCES, device, sizes, setting)
            rows, ratios = rows + found[0], ratios + found[1]
        del contenders, runs
        free(device)
    return {"methods": methods, "rows": rows, "ratios": ratios}


def measure_lean(device: torch.device, sizes: Sizes) -> Found:
    """Time steps with lean activations and without, and count what a layer keeps."""
    shape = replace(sizes.shape, num_hidden_layers=min(2, sizes.shape.num_hidden_layers))
    num_rows, num_tokens = sizes.batches[0]
    batch = make_batch(num_rows, num_tokens, shape.vocab_size, SEED).to(device)
    rows: list[Found] = []
    ratios: list[Found] = []
    failed_before = set(fused._failed)
    for method in (OURS, "lora"):
        plain, saving = (_contender(method, shape, device, torch.bfloat16) for _ in range(2))
        lean.enable(saving.model, mode="require")
        both = {method: plain, f"{method} lean": saving}
        runs = {name: partial(_step, c, batch, False) for name, c in both.items()}
        pairs = {f"{method} lean": [method]}
        found = _take_turns(runs, pairs, device, sizes, {"num_tokens": num_tokens})
        for row in found[0]:
            with SavedBytes(both[row["method"]].model) as saved:
                loss = loss_of(both[row["method"]].model, batch)
            del loss
            row["saved_bytes"] = saved.num_bytes
        rows, ratios = rows + found[0], ratios + found[1]
    failed = ", ".join(function.__name__ for function in fused._failed - failed_before)
    hold(not failed, f"lean kernels could not be compiled: {failed}")
    return {"rows": rows, "ratios": ratios}


def measure_compiled(device: torch.device, sizes: Sizes) -> Found:
    """Time steps of compiled models."""
    shape = replace(sizes.shape, num_hidden_layers=min(2, sizes.shape.num_hidden_layers))
    num_rows, num_tokens = sizes.batches[0]
    batch = make_batch(num_rows, num_tokens, shape.vocab_size, SEED).to(device)
    runs = {}
    torch.compiler.reset()
    for method in ("frozen", OURS, "lora"):
        contender = _contender(method, shape, device, torch.bfloat16)
        contender.model.compile(dynamic=False, backend=backend_on(device))
        runs[method] = partial(_step, contender, batch, False, loss_of_graph)
    setting = {"num_rows": num_rows, "num_tokens": num_tokens}
    rows, ratios = _take_turns(runs, REFERENCES, device, sizes, setting)
    torch.compiler.reset()
    return {"backend": backend_on(device), "rows": rows, "ratios": ratios}
