"""Find the longest sequence that trains on one GPU, simulated.

    python -m benchmarks.lengths               writes benchmarks/results/lengths.json

`rows`: LLaMA3-8B on 80 GB, at each lean level. `small_rows`: models on 24 GB. Rank 8, one sequence
per step, as `pacatune estimate --max seq-len`. Deterministic, and needs no GPU: some minutes of one
core.
"""

import sys
from pathlib import Path
from typing import Any

from benchmarks.record import compute
from pacatune.measure.device import gpu_bytes
from pacatune.measure.estimate import find_max
from pacatune.measure.setting import Setting

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
) -> list[dict[str, Any]]:
    """Return the longest sequence of each case, and what it keeps per token."""
    found = []
    for case in cases:
        setting = Setting(**{"model": model, "rank": RANK, **case})
        longest, estimate = find_max(setting, "seq_len", gpu_bytes(gpu))
        saved = 0 if estimate is None else estimate.measured.saved_bytes // longest
        found.append(
            {
                "model": setting.model,
                "quantization": setting.quantization,
                "method": setting.method,
                "adapters": setting.adapter_dtype,
                "level": setting.lean_level,
                "checkpointing": setting.gradient_checkpointing,
                "offloading": setting.activation_offloading,
                "max_seq_len": longest,
                "saved_bytes_per_token": saved,
            }
        )
    return found


def found() -> dict[str, list[dict[str, Any]]]:
    """Return the rows of both GPUs."""
    return {"rows": rows(), "small_rows": rows(SMALL_CASES, SMALL_GPU)}


def main(options: list[str] | None = None) -> Path:
    """Simulate, write the result, and return its path."""
    fixed = {"model": MODEL, "gpu": GPU, "small_gpu": SMALL_GPU, "rank": RANK}
    return compute("lengths", __doc__, options, lambda _: {**fixed, **found()})


if __name__ == "__main__":
    main()
    sys.exit()
