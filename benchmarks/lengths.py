"""Find the longest sequence that trains on one GPU, simulated.

    python -m benchmarks.lengths               writes benchmarks/results/lengths.json

LLaMA3-8B on 80 GB, at each lean level; models on 24 GB. Rank 8, one sequence per step, as
`pacatune estimate --max seq-len`. Deterministic, and needs no GPU: half an hour of one core.
"""

import sys
from typing import Any

from benchmarks.results import new_parser, record
from pacatune.measure.device import gpu_bytes
from pacatune.measure.estimate import find_max
from pacatune.measure.setting import Setting
from pacatune.reports.rows import Row

MODEL, GPU, SMALL_GPU, RANK = "llama3-8b", "a100-80g", "4090", 8
SMALL_MODELS = {
    "llama3.2-1b": None,
    "llama3.2-3b": None,
    MODEL: "nf4",
    "qwen3-8b": "nf4",
    "gemma3-12b": "nf4",
}
"""Model -> how it is quantised to train on the smaller GPU."""
_EXTRAS: tuple[dict[str, Any], ...] = (
    {"lean_level": 1},
    {"lean_level": 2},
    {"lean_level": 3},
    {"lean_level": 1, "gradient_checkpointing": True},
    {"lean_level": 2, "gradient_checkpointing": True},
)


def found() -> list[Row]:
    """Return the rows of both GPUs."""
    cases: list[dict[str, Any]] = [
        *_EXTRAS,
        {"lean_level": 2, "activation_offloading": True},
        *({"method": "lora", **extra} for extra in _EXTRAS),
        *({"method": "lora", "adapter_dtype": "bfloat16", **extra} for extra in _EXTRAS[:3]),
    ]
    rows = [row for case in cases for row in longest(Setting(model=MODEL, rank=RANK, **case), GPU)]
    for model, quantization in SMALL_MODELS.items():
        for extra in (_EXTRAS[1], _EXTRAS[4]):
            setting = Setting(model=model, rank=RANK, quantization=quantization, **extra)
            name = f"{model}, {quantization or setting.dtype}"
            rows += longest(setting, SMALL_GPU, name)
    return rows


def longest(setting: Setting, gpu: str, model: str = MODEL) -> list[Row]:
    """Return the longest sequence of a setting; of `MODEL` also what it keeps per token."""
    number, estimate = find_max(setting, "seq_len", gpu_bytes(gpu))
    how = [
        f"level {setting.lean_level}",
        *["checkpointing"] * setting.gradient_checkpointing,
        *["offloading"] * setting.activation_offloading,
    ]
    names: dict[str, Any] = {
        "method": f"{setting.method}, {setting.adapter_dtype} adapters",
        "setting": ", ".join(how),
        "model": model,
        "origin": "simulated",
    }
    rows = [Row(what="longest sequence", value=number, unit="tokens", **names)]
    if model == MODEL and estimate is not None:
        kept = estimate.saved_bytes // number
        rows.append(Row(what="kept per token", value=kept, unit="bytes", **names))
    return rows


def main(options: list[str] | None = None) -> None:
    """Simulate and write the result."""
    args = new_parser(__doc__).parse_args(options)
    how = f"Rank {RANK}, one sequence per step; {MODEL} on {GPU}, others on {SMALL_GPU}, simulated"
    record("lengths", how, found, args, options)


if __name__ == "__main__":
    sys.exit(main())
