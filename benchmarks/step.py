"""Measure whole training steps of a small Llama: PaCA against every other method.

    python -m benchmarks.step                  writes benchmarks/results/step.json
    python -m benchmarks.step --compiled       writes benchmarks/results/step-compiled.json
    python -m benchmarks.step --quantization nf4   QPaCA and QLoRA, into step-nf4.json
    python -m benchmarks.step --name groups --methods frozen paca paca_g8   into step-groups.json

A step is forward, backward and optimizer: with `--accumulation 4`, four micro-batches and one
optimizer step. All methods alternate in one process, one step each per round, and ratios are those
of the medians over the rounds. The exact counts beside them (bytes kept for backward, writes of
columns) do not depend on the machine; the command fails if PaCA keeps one byte more than it should.

`distance` says where PaCA's distance to the frozen model goes (`benchmarks/distance.py`): gather,
thin product, column write or the products in its place, optimizer, and the rest, which is Python.
"""

import argparse
import dataclasses
import sys
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from benchmarks.counts import check_bytes, count_column_writes, formula_bytes
from benchmarks.distance import TIMED, TimedStep, make_row, make_table
from benchmarks.llama import Shape, linear_layers, make_batch, make_model, make_step
from benchmarks.methods import METHODS, OURS, adapt, all_methods
from benchmarks.record import (
    DTYPES,
    Row,
    add_tokens,
    arguments,
    at_least_1,
    measure_all,
    prepare,
    provenance,
    take_turns,
    write,
)
from benchmarks.report import make_ratios, ratio_table
from pacatune.measure.counters import SavedBytes
from pacatune.measure.device import peak_process_bytes
from pacatune.measure.methods import Contender
from pacatune.measure.models import loss_of, loss_of_graph

# Tokens per micro-batch and micro-batches per optimizer step, unless options say otherwise.
SETTINGS = ((16, 1), (16, 4), (512, 1), (2048, 1))
COMPILED_METHODS = ("paca", "lora")
QUANTISED_METHODS = ("frozen", "paca", "lora", "lora_r4")
# The highest acceptable ratio of paca's step to another method's, by setting.
FLOOR_TARGETS = {
    "float32": {"frozen": dict(zip(SETTINGS, (1.15, 1.15, 1.05, 1.03), strict=True))},
    "bfloat16": {"frozen": dict(zip(SETTINGS, (1.30, 1.15, 1.08, 1.03), strict=True))},
}
TARGETS = {
    "swap": dict(zip(SETTINGS, (0.85, 0.75, 0.96, 0.98), strict=True)),
    "lora": dict(zip(SETTINGS, (0.92, 0.85, 0.88, 0.94), strict=True)),
    "lora_dropout": dict(zip(SETTINGS, (0.82, 0.75, 0.62, 0.65), strict=True)),
    "dora": dict(zip(SETTINGS, (0.40, 0.40, 0.45, 0.45), strict=True)),
    "full": dict(zip(SETTINGS, (0.60, 0.60, 0.78, 0.82), strict=True)),
}
COMPILED_TARGETS = {"lora": dict.fromkeys(SETTINGS, 1.0)}
QUANTISED_TARGETS = {"lora": dict.fromkeys(SETTINGS, 0.85)}


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What one comparison is made with."""

    num_tokens: int
    """Per micro-batch."""
    accumulation: int
    """Micro-batches per optimizer step."""
    dtype: str

    @property
    def label(self) -> str:
        """What tables call it."""
        times = "" if self.accumulation == 1 else f"{self.accumulation} x "
        return f"{times}{self.num_tokens} tokens, {self.dtype}"

    def to_dict(self) -> dict[str, Any]:
        """Return the fields, and the label as `setting`."""
        return {"setting": self.label, **dataclasses.asdict(self)}


def parse(options: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = arguments(__doc__, seconds=40.0)
    add_tokens(parser)
    add = parser.add_argument
    add("--accumulation", nargs="+", type=at_least_1, metavar="K", help="micro-batches per step")
    compiled = "compare under torch.compile; needs a C++ compiler"
    add("--compiled", action="store_true", help=compiled)
    frozen = "format of the frozen weights, by bitsandbytes"
    add("--quantization", choices=("nf4", "fp4"), help=frozen)
    add("--name", help="writes step-NAME.json; None: the kind of model")
    for field in dataclasses.fields(Shape):
        option = "--" + field.name.replace("_", "-")
        add(option, type=at_least_1, default=field.default, help="size of the Llama")
    args = parser.parse_args(options)
    for number in args.tokens or ():
        try:
            make_batch(number, args.vocab_size, args.seed)
        except ValueError as error:
            parser.error(str(error))
    if args.compiled and args.quantization:
        parser.error("--compiled and --quantization exclude each other")
    args.methods = args.methods or list(
        COMPILED_METHODS if args.compiled else QUANTISED_METHODS if args.quantization else METHODS
    )
    return args


def choose_settings(args: argparse.Namespace) -> list[Setting]:
    """Return the standard settings, or all combinations of the numbers that are given."""
    pairs: tuple[tuple[int, int], ...] = SETTINGS
    if args.tokens or args.accumulation:
        tokens = args.tokens or list(dict.fromkeys(number for number, _ in SETTINGS))
        pairs = tuple((number, k) for number in tokens for k in args.accumulation or [1])
    return [
        Setting(num_tokens=number, accumulation=k, dtype=dtype)
        for number, k in pairs
        for dtype in args.dtypes
    ]


def measure(
    setting: Setting, shape: Shape, args: argparse.Namespace, distances: list[Row]
) -> tuple[list[Row], list[Row]]:
    """Compare the methods in one setting; return a row per method and a ratio per pair.

    Where PaCA's distance to the frozen model can be taken apart, a row is added to `distances`.
    """
    batch = make_batch(setting.num_tokens, shape.vocab_size, args.seed)
    contenders = []
    for method in args.methods:
        model = make_model(shape, DTYPES[setting.dtype], args.seed, args.quantization)
        contenders.append(adapt(model, method, targets="all-linear", seed=args.seed))
    if args.compiled:
        # Compiled code is cached per function, up to a limit beyond which models run uncompiled.
        torch.compiler.reset()
        counts = {c.method: compile_and_count(c, batch) for c in contenders}
    else:
        counts = {c.method: count(c, batch, setting.accumulation) for c in contenders}
    loss = loss_of_graph if args.compiled else loss_of
    steps = {c.method: make_step(c, batch, setting.accumulation, loss) for c in contenders}
    is_eager = not (args.compiled or args.quantization)
    timed = None
    if is_eager and {OURS, "frozen"} <= steps.keys():
        (ours,) = (contender for contender in contenders if contender.method == OURS)
        timed = steps[TIMED] = TimedStep(ours, batch, setting.accumulation)
        counts[TIMED] = {}
    rows, times = take_turns(setting.to_dict(), steps, counts, args)
    if timed is not None:
        num_rounds = len(times.pop(TIMED))
        rows = [row for row in rows if row["method"] != TIMED]
        distances.append(make_row(setting.to_dict(), rows, timed, num_rounds))
    key = (setting.num_tokens, setting.accumulation)
    by_reference: dict[str, dict[tuple[int, int], float]] = TARGETS | FLOOR_TARGETS[setting.dtype]
    if args.compiled or args.quantization:
        by_reference = COMPILED_TARGETS if args.compiled else QUANTISED_TARGETS
    targets = {name: limits[key] for name, limits in by_reference.items() if key in limits}
    return rows, make_ratios(setting.to_dict(), times, targets, args.seed)


def count(contender: Contender, batch: Tensor, accumulation: int) -> dict[str, Any]:
    """Return what is exact about a method: parameters, bytes kept for backward, column writes."""
    model, layers = contender.model, linear_layers(contender.model)
    with SavedBytes(model, layers) as saved:
        loss = model(input_ids=batch, labels=batch).loss
    del loss
    counts: dict[str, Any] = {
        "num_trainable_parameters": contender.num_trainable_parameters,
        "saved_bytes": saved.num_bytes,
        "saved_bytes_by_layer": saved.num_bytes_by_kind,
    }
    if contender.method == OURS:
        counts["formula_bytes_by_layer"] = formula_bytes(layers, batch.numel(), model.dtype)
        step = make_step(contender, batch, accumulation)
        step()
        with count_column_writes() as num_writes:
            step()
        counts["column_writes_per_layer"] = num_writes() / len(layers)
    return counts


def compile_and_count(contender: Contender, batch: Tensor) -> dict[str, Any]:
    """Compile the model in place; return what its graphs keep for backward."""
    model = contender.model
    model.compile(dynamic=False)
    loss_of_graph(model, batch).backward()
    with SavedBytes(model, {}) as saved:
        loss = loss_of_graph(model, batch)
    loss.backward()
    model.zero_grad()
    return {
        "num_trainable_parameters": contender.num_trainable_parameters,
        "saved_bytes": saved.num_bytes,
    }


def main(options: list[str] | None = None) -> None:
    """Measure every setting, write the result, print the ratios."""
    args = parse(options)
    prepare(args)
    console = Console(highlight=False, width=120)
    shape = Shape(**{f.name: getattr(args, f.name) for f in dataclasses.fields(Shape)})
    result = provenance("benchmarks.step", args, options)
    distances: list[Row] = []
    settings = [
        (one.label, partial(measure, one, shape, args, distances)) for one in choose_settings(args)
    ]
    rows, ratios = measure_all(settings, console)
    check_bytes(rows)
    result |= {
        "model": f"Llama, hidden {shape.hidden_size}, {shape.num_hidden_layers} layers"
        + (", compiled" if args.compiled else "")
        + (f", {args.quantization}" if args.quantization else ""),
        "shape": dataclasses.asdict(shape),
        "methods": {name: all_methods()[name] for name in args.methods},
        "peak_process_bytes": peak_process_bytes(),
        "rows": rows,
        "ratios": ratios,
        **({"distance": distances} if distances else {}),
    }
    kind = args.name or ("compiled" if args.compiled else args.quantization)
    path = write(result, args.output, f"step-{kind}" if kind else "step")
    console.print(ratio_table(result))
    if distances:
        console.print(make_table(distances))
    console.print(f"wrote {path}")


if __name__ == "__main__":
    sys.exit(main())
