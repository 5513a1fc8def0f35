"""Measure patches: their size, and how long it takes to apply one, in memory and in files.

    python -m benchmarks.patch                  writes benchmarks/results/patch.json

The model is a Llama of a few layers in bfloat16 with random weights; every linear layer is adapted.
`merge` is what a patch replaces. Files are read from and written to the system's cache, as the disk
allows.
"""

import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from benchmarks.methods import CPU
from benchmarks.results import counted, new_parser, record
from pacatune import patch
from pacatune.adapters.merge import merge
from pacatune.files.checkpoint import Checkpoint
from pacatune.measure.methods import adapt
from pacatune.measure.models import llama_values, make_model
from pacatune.measure.timing import time_row
from pacatune.reports.rows import Row

VALUES = llama_values(
    2048, 4, num_heads=32, num_kv_heads=8, intermediate_size=8192, vocab_size=32000
)
RANK = 16
_IN_MEMORY, _IN_FILES = 5, 3
"""How often each is timed; in place half of the times are reverts."""


def build(seed: int, folder: Path) -> tuple[Path, Path]:
    """Write a base and an adapter of it; return their folders."""
    base, adapter = folder / "base", folder / "adapter"
    made: Any = make_model(VALUES, torch.bfloat16, CPU, seed=seed)
    made.save_pretrained(base)
    adapted: Any = adapt(load(base), "paca", rank=RANK, seed=seed).model
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.01)
    adapted.save_pretrained(adapter)
    return base, adapter


def seconds_of(function: Callable[[], object]) -> float:
    """Return the time of one run."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def load(folder: Path) -> Any:
    """Return the model of a folder, in its own dtype."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto")


def measure(seed: int, folder: Path) -> list[Row]:
    """Return sizes and times of one patch."""
    base, adapter = build(seed, folder)
    made, _ = patch.make(base, adapter)
    alone = patch.Patch(edits=made.edits, base=made.base, fingerprint=made.fingerprint)
    model, outputs = load(base), (folder / f"out{number}" for number in count())
    in_files = {
        "patch file": lambda: patch.make(base, adapter),
        "apply to a new folder": lambda: patch.apply_to_folder(base, made, next(outputs)),
        "merge --no-verify": lambda: merge(str(base), adapter, next(outputs), verify=False),
    }
    times = {name: [seconds_of(run) for _ in range(_IN_FILES)] for name, run in in_files.items()}
    in_memory = {"apply in memory": patch.apply, "revert in memory": patch.revert}
    for number in range(_IN_MEMORY + 1):
        for name, run in in_memory.items():
            seconds = seconds_of(partial(run, model, made))
            if number:  # the first is warm-up
                times.setdefault(name, []).append(seconds)
    in_place = partial(patch.apply_in_place, base, made)
    times["apply in place"] = [
        seconds_of(partial(in_place, revert=is_revert)) for is_revert in (False, True) * _IN_FILES
    ]
    whole = Checkpoint.open(base).num_bytes
    sizes = {
        "checkpoint": whole,
        "changed columns, once": made.num_bytes,
        "patch file": patch.save(made, folder / "p.safetensors"),
        "patch file, --no-adapter": patch.save(alone, folder / "small.safetensors"),
        "apply in memory": made.num_bytes,
        "revert in memory": made.num_bytes,
        "apply in place": in_place().page_bytes,
        "apply to a new folder": whole,
        "merge --no-verify": whole,
    }
    rows = []
    for name, num_bytes in sizes.items():
        rows.append(counted("written", name, num_bytes, "bytes"))
        if name in times:
            rows.append(time_row(times[name], what="time", method=name))
    return rows


def main(options: list[str] | None = None) -> None:
    """Measure, write the result, print it."""
    args = new_parser(__doc__, is_timed=True).parse_args(options)
    how = (
        f"Llama, hidden {VALUES['hidden_size']}, {VALUES['num_hidden_layers']} layers, bfloat16, "
        f"r = {RANK} in every linear layer; bytes that are written, and medians of {_IN_FILES} to "
        f"{2 * _IN_FILES}"
    )
    with tempfile.TemporaryDirectory() as folder:
        record("patch", how, lambda: measure(args.seed, Path(folder)), args, options)


if __name__ == "__main__":
    sys.exit(main())
