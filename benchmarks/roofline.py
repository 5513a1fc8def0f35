"""Estimate steps of LLaMA3-8B on an H100 from their kernels, without a GPU.

    python -m benchmarks.roofline              writes benchmarks/results/roofline.json

Nothing is measured: `pacatune estimate --time` says what its model is. Takes seven minutes.
"""

import sys
from itertools import product

from benchmarks.results import new_parser, record
from pacatune.measure.roofline import estimate_time
from pacatune.measure.setting import Dtype, MicroBatch, Setting
from pacatune.reports.rows import Row

MODEL, GPU = "llama3-8b", "h100"
COMPARED = ("paca", "lora", "lora_dropout", "dora")
SIZES = ((2, 512), (8, 512), (1, 8192))
ADAPTERS: tuple[Dtype, ...] = ("bfloat16", "float32")


def estimate_all() -> list[Row]:
    """Return a row for each dtype of adapters, size and method."""
    rows = []
    for adapters, (num_rows, num_tokens), method in product(ADAPTERS, SIZES, COMPARED):
        setting = Setting(
            model=MODEL,
            method=method,
            batch_size=num_rows,
            seq_len=num_tokens,
            adapter_dtype=adapters,
            lean="off",
            loss="logits",
        )
        found = estimate_time(setting, GPU)
        label = MicroBatch(num_rows=num_rows, num_tokens=num_tokens).label
        rows.append(
            Row(
                what="step",
                method=method,
                value=found.ms,
                low=found.low_ms,
                high=found.high_ms,
                unit="ms",
                model=MODEL,
                setting=f"{label}, {adapters} adapters",
                origin="simulated",
            )
        )
    return rows


def main(options: list[str] | None = None) -> None:
    """Estimate and write the result."""
    args = new_parser(__doc__).parse_args(options)
    how = f"{MODEL} on {GPU}, estimated by a roofline and not measured"
    record("roofline", how, estimate_all, args, options, COMPARED)


if __name__ == "__main__":
    sys.exit(main())
