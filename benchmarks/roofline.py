"""Estimate steps of LLaMA3-8B on an H100 from their kernels, without a GPU.

    python -m benchmarks.roofline              writes benchmarks/results/roofline.json

Nothing is measured: `pacatune estimate --time` says what its model is. Takes seven minutes.
"""

import sys

from benchmarks.methods import METHODS
from benchmarks.results import Result, new_parser, provenance, quiet_peft, show
from pacatune.measure.roofline import estimate_time
from pacatune.measure.setting import Dtype, MicroBatch, Setting
from pacatune.reports.rows import Row

__all__ = ["estimate_all", "main"]

COMPARED = ("paca", "lora", "lora_dropout", "dora")
SIZES = ((2, 512), (8, 512), (1, 8192))
ADAPTERS: tuple[Dtype, ...] = ("bfloat16", "float32")


def estimate_all(model: str, gpu: str) -> list[Row]:
    """Return a row for each dtype of adapters, size and method."""
    return [
        _estimate(model, gpu, method, MicroBatch(num_rows=rows, num_tokens=tokens), adapters)
        for adapters in ADAPTERS
        for rows, tokens in SIZES
        for method in COMPARED
    ]


def _estimate(model: str, gpu: str, method: str, batch: MicroBatch, adapters: Dtype) -> Row:
    setting = Setting(
        model=model,
        method=method,
        batch_size=batch.num_rows,
        seq_len=batch.num_tokens,
        adapter_dtype=adapters,
        lean="off",
        loss="logits",
    )
    found = estimate_time(setting, gpu)
    return Row(
        what="step",
        method=method,
        value=found.ms,
        low=found.low_ms,
        high=found.high_ms,
        unit="ms",
        model=model,
        setting=f"{batch.label}, {adapters} adapters",
        origin="simulated",
    )


def main(options: list[str] | None = None) -> None:
    """Estimate and write the result."""
    parser = new_parser(__doc__)
    parser.add_argument("--model", default="llama3-8b")
    parser.add_argument("--gpu", default="h100")
    args = parser.parse_args(options)
    quiet_peft()
    how = f"{args.model} on {args.gpu}, estimated by a roofline and not measured"
    made = provenance("roofline", how, options)
    rows = estimate_all(args.model, args.gpu)
    methods = {name: METHODS[name] for name in COMPARED}
    show(Result(name="roofline", rows=rows, methods=methods, provenance=made), args.output)


if __name__ == "__main__":
    from pacatune.cli.options import quiet_libraries

    quiet_libraries()
    sys.exit(main())
