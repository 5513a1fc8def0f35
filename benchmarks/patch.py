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
from rich.console import Console
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from benchmarks.record import add_run, new_parser, prepare, provenance, write
from benchmarks.sync import count
from pacatune import PacaConfig, patch
from pacatune.adapters.merge import merge
from pacatune.files.checkpoint import Checkpoint

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


def count_llama3_8b(rank: int) -> dict[str, int]:
    """Return the bytes of LLaMA3-8B in bfloat16, and of `rank` columns of each linear layer."""
    sizes = {row["method"]: row["bytes"] for row in count("llama3-8b", rank, share=0.0)}
    return {"llama3_8b_bytes": sizes["full"], "llama3_8b_columns_bytes": sizes["paca"]}


def seconds_of(function: Callable[[], object], num_rounds: int = NUM_ROUNDS) -> float:
    """Return the median of a few runs."""
    times = []
    for _ in range(num_rounds):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def measure(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Return sizes and times of one patch."""
    base, adapter = build(args, folder)
    made, _ = patch.make(base, adapter)
    make_s = seconds_of(lambda: patch.make(base, adapter), 3)
    sizes = {
        "columns_bytes": made.num_bytes,
        "file_bytes": patch.save(made, folder / "p.safetensors"),
        "file_without_adapter_bytes": patch.save(
            patch.Patch(edits=made.edits, base=made.base, fingerprint=made.fingerprint),
            folder / "small.safetensors",
        ),
        "checkpoint_bytes": Checkpoint.open(base).num_bytes,
    }
    model = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
    times: dict[str, list[float]] = {"apply_s": [], "revert_s": []}
    for _ in range(NUM_ROUNDS + 1):
        times["apply_s"].append(seconds_of(lambda: patch.apply(model, made), 1))
        times["revert_s"].append(seconds_of(lambda: patch.revert(model, made), 1))
    numbers = iter(range(1000))
    to_folder = seconds_of(
        lambda: patch.apply_to_folder(base, made, folder / f"out{next(numbers)}"), 3
    )
    in_place = []
    for is_revert in (False, True) * 3:
        start = time.perf_counter()
        result = patch.apply_in_place(base, made, revert=is_revert)
        in_place.append(time.perf_counter() - start)
    merge_s = seconds_of(
        lambda: merge(str(base), adapter, folder / f"out{next(numbers)}", verify=False), 3
    )
    return {
        **sizes,
        "page_bytes": result.page_bytes,
        "num_tensors": len(made.edits),
        "make_s": make_s,
        **{name: statistics.median(values[1:]) for name, values in times.items()},
        "apply_to_folder_s": to_folder,
        "apply_in_place_s": statistics.median(in_place),
        "merge_s": merge_s,
    }


def main(options: list[str] | None = None) -> None:
    """Measure, write the result, print it."""
    args = parse(options)
    prepare(args)
    result = provenance("benchmarks.patch", args, options)
    with tempfile.TemporaryDirectory() as folder:
        row = measure(args, Path(folder)) | count_llama3_8b(args.rank)
    result |= {
        "model": f"Llama, hidden {args.hidden_size}, {args.num_layers} layers, bfloat16, "
        f"r = {args.rank} in every linear layer",
        "rows": [row],
    }
    path = write(result, args.output, "patch")
    console = Console(highlight=False)
    for name, value in row.items():
        console.print(f"{name:<28}{value:,.4g}" if name.endswith("_s") else f"{name:<28}{value:,}")
    console.print(f"wrote {path}")


if __name__ == "__main__":
    sys.exit(main())
