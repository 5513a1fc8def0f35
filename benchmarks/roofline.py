"""Estimate steps of LLaMA3-8B on an H100 from their kernels, without a GPU.

    python -m benchmarks.roofline              writes benchmarks/results/roofline.json

Nothing is measured: `pacatune estimate --time` says what its model is. Takes seven minutes.
"""

import sys
from pathlib import Path
from typing import Any

from benchmarks.methods import METHODS
from benchmarks.record import compute
from pacatune.measure.roofline import MODEL, estimate_time
from pacatune.measure.setting import Dtype, MicroBatch, Setting

__all__ = ["estimate_all", "main"]

COMPARED = ("paca", "lora", "lora_dropout", "dora")
SIZES = ((2, 512), (8, 512), (1, 8192))
ADAPTERS: tuple[Dtype, ...] = ("bfloat16", "float32")


def estimate_all(model: str, gpu: str) -> list[dict[str, Any]]:
    """Return a row for each dtype of adapters, size and method."""
    return [
        _estimate(model, gpu, method, MicroBatch(num_rows=rows, num_tokens=tokens), adapters)
        for adapters in ADAPTERS
        for rows, tokens in SIZES
        for method in COMPARED
    ]


def _estimate(
    model: str, gpu: str, method: str, batch: MicroBatch, adapters: Dtype
) -> dict[str, Any]:
    setting = Setting(
        model=model,
        method=method,
        batch_size=batch.num_rows,
        seq_len=batch.num_tokens,
        adapter_dtype=adapters,
        lean="off",
        loss="logits",
    )
    values = estimate_time(setting, gpu).to_values()
    for name in ("model", "origin", "notes"):
        del values[name]
    label = f"{batch.label}, {adapters} adapters"
    return {"setting": label, "adapter_dtype": adapters, "method": method, **values}


def main(options: list[str] | None = None) -> Path:
    """Estimate, write the result, and return its path."""
    return compute(
        "roofline",
        __doc__,
        options,
        lambda args: {
            "origin": "roofline",
            "note": MODEL,
            "model": args.model,
            "gpu": args.gpu,
            "methods": {name: METHODS[name] for name in COMPARED},
            "rows": estimate_all(args.model, args.gpu),
        },
        model="llama3-8b",
        gpu="h100",
    )


if __name__ == "__main__":
    from pacatune.cli.options import quiet_libraries

    quiet_libraries()
    main()
    sys.exit(0)
