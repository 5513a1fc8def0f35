"""Find the longest sequence that trains on one GPU, simulated.

    python -m benchmarks.lengths               writes benchmarks/results/lengths.json

LLaMA3-8B on 80 GB, at each lean level; models on 24 GB. Rank 8, one sequence per step, as
`pacatune estimate --max seq-len`. Deterministic, and needs no GPU: half an hour of one core.
"""

import sys
from typing import Any

from benchmarks.results import Result, new_parser, provenance, quiet_peft, show
from pacatune.measure.device import gpu_bytes
from pacatune.measure.estimate import find_max
from pacatune.measure.setting import Setting
from pacatune.reports.rows import Row

GPU, RANK = "a100-80g", 8
MODEL = "llama3-8b"
SMALL_GPU = "4090"
_EXTRAS: tuple[dict[str, Any], ...] = (
    {"lean_level": 1},
    {"lean_level": 2},
    {"lean_level": 3},
    {"lean_level": 1, "gradient_checkpointing": True},
    {"lean_level": 2, "gradient_checkpointing": True},
)
CASES: tuple[dict[str, Any], ...] = (
    *({"method": "paca", **extra} for extra in _EXTRAS),
    {"method": "paca", "lean_level": 2, "activation_offloading": True},
    *({"method": "lora", **extra} for extra in _EXTRAS),
    *({"method": "lora", "adapter_dtype": "bfloat16", **extra} for extra in _EXTRAS[:3]),
)
SMALL_CASES: tuple[dict[str, Any], ...] = tuple(
    {"model": model, "method": "paca", "quantization": quantization, **_EXTRAS[number]}
    for model, quantization in (
        ("llama3.2-1b", None),
        ("llama3.2-3b", None),
        ("llama3-8b", "nf4"),
        ("qwen3-8b", "nf4"),
        ("gemma3-12b", "nf4"),
    )
    for number in (1, 4)  # level 2, also with checkpointing
)


def rows(
    cases: tuple[dict[str, Any], ...] = CASES, gpu: str = GPU, model: str = MODEL
) -> list[Row]:
    """Return the longest sequence of each case, and what it keeps per token."""
    found = []
    for case in cases:
        setting = Setting(**{"model": model, "rank": RANK, **case})
        longest, estimate = find_max(setting, "seq_len", gpu_bytes(gpu))
        options = {
            "checkpointing": setting.gradient_checkpointing,
            "offloading": setting.activation_offloading,
        }
        held = setting.quantization or setting.dtype
        names: dict[str, Any] = {
            "method": f"{setting.method}, {setting.adapter_dtype} adapters",
            "setting": ", ".join(
                [f"level {setting.lean_level}", *(name for name, is_on in options.items() if is_on)]
            ),
            "model": setting.model
            if setting.model == MODEL and gpu == GPU
            else f"{setting.model}, {held}",
            "origin": "simulated",
        }
        found.append(Row(what="longest sequence", value=longest, unit="tokens", **names))
        if estimate is not None:
            kept = estimate.saved_bytes // longest
            found.append(Row(what="kept per token", value=kept, unit="bytes", **names))
    return found


def found() -> list[Row]:
    """Return the rows of both GPUs."""
    return [*rows(), *rows(SMALL_CASES, SMALL_GPU)]


def main(options: list[str] | None = None) -> None:
    """Simulate and write the result."""
    args = new_parser(__doc__).parse_args(options)
    quiet_peft()
    how = f"Rank {RANK}, one sequence per step; {MODEL} on {GPU}, others on {SMALL_GPU}, simulated"
    made = provenance("lengths", how, options)
    show(Result(name="lengths", rows=found(), methods={}, provenance=made), args.output)


if __name__ == "__main__":
    sys.exit(main())
