"""Measure patches: their size, and how long it takes to apply one, in memory and in files.

    python -m benchmarks.patch                  writes benchmarks/results/patch.json

The model is a Llama of a few layers in bfloat16 with random weights; every linear layer is adapted.
`merge` is what a patch replaces. Files are read from and written to the system's cache, as the disk
allows. The columns of a whole LLaMA3-8B are counted from its shapes.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from benchmarks.results import Result, add_run, counted, new_parser, prepare, provenance, show
from benchmarks.sync import count
from pacatune import PacaConfig, patch
from pacatune.adapters.merge import merge
from pacatune.files.checkpoint import Checkpoint
from pacatune.reports.rows import Row

NUM_ROUNDS = 5


def parse(options: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = new_parser(__doc__)
    sizes = {"hidden_size": 2048, "intermediate_size": 8192, "num_layers": 4, "vocab_size": 32000}
    add_run(parser, **sizes, rank=16)
    return parser.parse_args(options)


def build(args: argparse.Namespace, folder: Path) -> tuple[Path, Path]:
    """Write a base and an adapter of it; return their folders."""
    config = LlamaConfig(
        hidden_size=args.hidden_size,
        intermediate_size=args.intermediate_size,
        num_hidden_layers=args.num_layers,
        num_attention_heads=max(1, args.hidden_size // 64),
        num_key_value_heads=max(1, args.hidden_size // 256),
        vocab_size=args.vocab_size,
    )
    model = LlamaForCausalLM(config).bfloat16()
    model.save_pretrained(folder / "base")
    adapted: Any = get_peft_model(
        AutoModelForCausalLM.from_pretrained(folder / "base", dtype="auto"),
        PacaConfig(r=args.rank, paca_alpha=args.rank, target_modules="all-linear"),
    )
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "paca_" in name:
                parameter.normal_(std=0.02)
    adapted.save_pretrained(folder / "adapter")
    return folder / "base", folder / "adapter"


def seconds_of(function: Callable[[], object], num_rounds: int = NUM_ROUNDS) -> float:
    """Return the median of a few runs."""
    times = []
    for _ in range(num_rounds):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def measure(args: argparse.Namespace, folder: Path) -> list[Row]:
    """Return sizes and times of one patch, and of the columns of LLaMA3-8B."""
    base, adapter = build(args, folder)
    made, _ = patch.make(base, adapter)
    alone = patch.Patch(edits=made.edits, base=made.base, fingerprint=made.fingerprint)
    whole = Checkpoint.open(base).num_bytes
    made_in = seconds_of(lambda: patch.make(base, adapter), 3)
    model = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
    apply, revert = [], []
    for _ in range(NUM_ROUNDS + 1):
        apply.append(seconds_of(lambda: patch.apply(model, made), 1))
        revert.append(seconds_of(lambda: patch.revert(model, made), 1))
    numbers = iter(range(1000))
    to_folder = seconds_of(
        lambda: patch.apply_to_folder(base, made, folder / f"out{next(numbers)}"), 3
    )
    in_place = []
    for is_revert in (False, True) * 3:
        start = time.perf_counter()
        result = patch.apply_in_place(base, made, revert=is_revert)
        in_place.append(time.perf_counter() - start)
    merged = seconds_of(
        lambda: merge(str(base), adapter, folder / f"out{next(numbers)}", verify=False), 3
    )
    large = {row.method: row.value for row in count("llama3-8b", args.rank, share=0.0)}
    return [
        *_rows("checkpoint", whole),
        *_rows("changed columns, once", made.num_bytes),
        *_rows("patch file", patch.save(made, folder / "p.safetensors"), made_in),
        *_rows("patch file, --no-adapter", patch.save(alone, folder / "small.safetensors")),
        *_rows("apply in memory", made.num_bytes, statistics.median(apply[1:])),
        *_rows("revert in memory", made.num_bytes, statistics.median(revert[1:])),
        *_rows("apply in place", result.page_bytes, statistics.median(in_place)),
        *_rows("apply to a new folder", whole, to_folder),
        *_rows("merge --no-verify", whole, merged),
        counted("columns of LLaMA3-8B", "changed columns, once", large["paca"], "bytes"),
        counted("LLaMA3-8B", "checkpoint", large["full"], "bytes"),
    ]


def _rows(what: str, num_bytes: int, seconds: float | None = None) -> list[Row]:
    rows = [counted("written", what, num_bytes, "bytes")]
    if seconds is not None:
        rows.append(Row(what="time", method=what, value=1e3 * seconds, unit="ms", n=NUM_ROUNDS))
    return rows


def main(options: list[str] | None = None) -> None:
    """Measure, write the result, print it."""
    args = parse(options)
    prepare(args)
    how = (
        f"Llama, hidden {args.hidden_size}, {args.num_layers} layers, bfloat16, r = {args.rank} in "
        f"every linear layer; bytes that are written, and medians of 3 to {NUM_ROUNDS}"
    )
    made = provenance("patch", how, options, args)
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(args, Path(folder))
    show(Result(name="patch", rows=rows, methods={}, provenance=made), args.output)


if __name__ == "__main__":
    sys.exit(main())
