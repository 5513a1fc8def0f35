"""How long a step would take on a GPU, from its kernels and the rates that a GPU sustains.

Each kernel of the simulated step takes the longest of

    its operations  / the rate of products, or of attention
    its bytes       / the rate of memory, which is lower for thin products
    its launches    * the least time between two

and the step is their sum. This is a model: no GPU has run it. Its rates are those of the H100 that
an earlier analysis of such steps worked with; other GPUs have them in proportion to the published
peaks. Host time is left out, so small steps of eager PyTorch take longer than this says.
"""

from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

from pacatune.measure.kernels import Kernel
from pacatune.measure.setting import Setting
from pacatune.measure.simulate import FakeTraining
from pacatune.names import guess
from pacatune.reports.rows import Row

THIN = 64
# What an H100 sustains. Products in 16 bits: low, usual, high; in float32: without TF32.
_GEMM_TFLOPS, _FLOAT32_TFLOPS = (650, 690, 730), 50
# Elementwise kernels, and products with one side of at most `THIN`: bytes read and written.
_STREAM_TBPS, _THIN_TBPS = 2.55, 1.8
# The least time of a kernel.
_LAUNCH_US = 3.0
# Published peaks of the H100 SXM, dense: 16-bit TFLOP/s and TB/s.
_H100_TFLOPS, _H100_TBPS = 989, 3.35


class Rates(NamedTuple):
    """What a GPU sustains, in proportion to the H100."""

    operations: float
    """Share of the H100's rates of products, by the published peaks."""
    memory: float
    """The same of memory."""
    attention_tflops: float
    """FlashAttention-2, forward and backward, 128 channels per head."""


# FlashAttention-2 was made for the A100, and uses more of it.
GPU_RATES = {
    "h100": Rates(1.0, 1.0, 350),
    "h200": Rates(1.0, 4.8 / _H100_TBPS, 350),
    "a100-80g": Rates(312 / _H100_TFLOPS, 2.039 / _H100_TBPS, 190),
    "a100-40g": Rates(312 / _H100_TFLOPS, 1.555 / _H100_TBPS, 190),
}

MODEL = (
    "step times are a roofline over the kernels of the simulated step, not a measurement, and have "
    "not been checked on a GPU; host time and communication are not in them."
)
_FEW_TOKENS = 800
_HOST = (
    "with {tokens} tokens per micro-batch, fewer than about {few}, eager PyTorch cannot keep an "
    "H100 busy: steps take longer than estimated."
)


@dataclass(frozen=True)
class StepTime:
    """The time of one optimiser step, in milliseconds."""

    ms: float
    low_ms: float
    """With the highest rate of products."""
    high_ms: float
    """With the lowest."""
    by_kind_ms: dict[str, float]
    """Parts of `ms`: large products, thin products, attention, elementwise."""
    launch_ms: float
    """The part of `ms` in which a kernel has ended and the next has not begun."""
    num_launches: int
    tflop: float
    gigabytes: float
    """Bytes that kernels other than large products and attention move."""
    notes: tuple[str, ...] = ()

    def rows(self, method: str) -> list[Row]:
        """Return the step, between the rates of products, and its parts."""
        names: dict[str, Any] = {"what": "time", "method": method, "unit": "ms"}
        names["origin"] = "simulated"
        parts = self.by_kind_ms | {"between kernels, of these": self.launch_ms}
        return [
            Row(setting="step", value=self.ms, low=self.low_ms, high=self.high_ms, **names),
            *(Row(setting=part, value=ms, **names) for part, ms in parts.items()),
        ]

    def to_values(self) -> dict[str, Any]:
        """Return everything as plain values."""
        values = {"step_ms": self.ms, **asdict(self), "origin": "roofline", "model": MODEL}
        del values["ms"]
        return values


def estimate_time(setting: Setting, gpu: str) -> StepTime:
    """Estimate how long an optimiser step of a setting takes on one GPU.

    Raises:
        ValueError: If the GPU's rates are not known, or several devices share the work.
    """
    rates = rates_of(gpu)
    if setting.sharding != "none":
        raise ValueError(
            f"a step's time with `sharding` ({setting.sharding!r}): communication is not modelled; "
            "estimate the time of one device without."
        )
    kernels = FakeTraining(setting).count_kernels(setting.batch_size, setting.seq_len)
    step = time_of(kernels, rates, setting.gradient_accumulation)
    tokens = setting.batch_size * setting.seq_len
    if tokens >= _FEW_TOKENS:
        return step
    return replace(step, notes=(_HOST.format(tokens=tokens, few=_FEW_TOKENS),))


def rates_of(gpu: str) -> Rates:
    """Return what one of `GPU_RATES` sustains; refuse others."""
    if gpu.lower() not in GPU_RATES:
        hint = guess(gpu.lower(), GPU_RATES, cutoff=0.4) or "none is like it. "
        raise ValueError(
            f"the rates of GPU {gpu!r} are not known; {hint}Step times can be estimated for "
            f"{', '.join(GPU_RATES)}."
        )
    return GPU_RATES[gpu.lower()]


def time_of(kernels: Iterable[Kernel], rates: Rates, num_micro_batches: int = 1) -> StepTime:
    """Return the time of an optimiser step whose kernels `FakeTraining.count_kernels` returned."""
    times = {"micro-batch": num_micro_batches - 1}
    by_kind = dict.fromkeys(("large products", "thin products", "attention", "elementwise"), 0.0)
    low = high = launch = flops = num_bytes = 0.0
    num_launches = 0
    for kernel in kernels:
        number = times.get(kernel.phase, 1)
        kind = _kind(kernel)
        fast, usual, slow = (_seconds(kernel, kind, rates, rate) for rate in reversed(_GEMM_TFLOPS))
        least = kernel.launches * _LAUNCH_US * 1e-6
        by_kind[kind] += number * max(usual, least)
        low += number * max(fast, least)
        high += number * max(slow, least)
        launch += number * max(0.0, least - usual)
        num_launches += number * kernel.launches
        flops += number * kernel.flops
        num_bytes += number * (kernel.num_bytes if kind.startswith(("thin", "elem")) else 0)
    return StepTime(
        ms=1e3 * sum(by_kind.values()),
        low_ms=1e3 * low,
        high_ms=1e3 * high,
        by_kind_ms={kind: 1e3 * seconds for kind, seconds in by_kind.items()},
        launch_ms=1e3 * launch,
        num_launches=num_launches,
        tflop=flops / 1e12,
        gigabytes=num_bytes / 1e9,
    )


def _kind(kernel: Kernel) -> str:
    if kernel.kind != "gemm":
        return kernel.kind
    return "thin products" if kernel.smallest_side <= THIN else "large products"


def _seconds(kernel: Kernel, kind: str, rates: Rates, gemm_tflops: float) -> float:
    """Return how long the work of a kernel takes."""
    if kind == "attention":
        return kernel.flops / rates.attention_tflops / 1e12
    tbps = rates.memory * (_THIN_TBPS if kind.startswith("thin") else _STREAM_TBPS)
    memory = kernel.num_bytes / tbps
    if kind == "elementwise":
        return memory / 1e12
    is_float32 = max(operand.itemsize for operand in kernel.reads) > 2
    rate = rates.operations * (_FLOAT32_TFLOPS if is_float32 else gemm_tflops)
    return max(kernel.flops / rate, memory) / 1e12
