"""Measure whole training steps of a small Llama: PaCA against every other method.

    python -m benchmarks.step                  writes benchmarks/results/step.json
    python -m benchmarks.step --compiled       writes benchmarks/results/step-compiled.json
    python -m benchmarks.step --quantization nf4   QPaCA and QLoRA, into step-nf4.json
    python -m benchmarks.step --name groups --methods frozen paca paca_g8   into step-groups.json

A step is forward, backward and optimizer: with `--accumulation 4`, four micro-batches and one
optimizer step. All methods alternate in one process, one step each per round, and ratios are those
of the medians over the rounds. The exact counts beside them (bytes kept for backward, writes of
columns) do not depend on the machine; the command fails if PaCA keeps one byte more than it should.
"""

import argparse
import dataclasses
import sys
from typing import Any

import torch
from torch import Tensor

from benchmarks.counts import count_column_writes, hold_bytes
from benchmarks.llama import Shape, linear_layers, make_batch, make_model
from benchmarks.methods import METHODS, OURS, adapt, all_methods
from benchmarks.results import (
    DTYPES,
    Result,
    at_least_1,
    counted,
    prepare,
    provenance,
    show,
    take_turns,
    timed_parser,
)
from pacatune.measure.counters import SavedBytes
from pacatune.measure.methods import Contender
from pacatune.measure.models import loss_of, loss_of_graph
from pacatune.measure.step import Step
from pacatune.reports.rows import Row

# Tokens per micro-batch and micro-batches per optimizer step, unless options say otherwise.
SETTINGS = ((16, 1), (16, 4), (512, 1), (2048, 1))
COMPILED_METHODS = ("paca", "lora")
QUANTISED_METHODS = ("frozen", "paca", "lora", "lora_r4")


def parse(options: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = timed_parser(__doc__, seconds=40.0)
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


def choose_settings(args: argparse.Namespace) -> list[tuple[int, int, str]]:
    """Return tokens, micro-batches and dtype: the standard ones, or all that are given."""
    pairs: tuple[tuple[int, int], ...] = SETTINGS
    if args.tokens or args.accumulation:
        tokens = args.tokens or list(dict.fromkeys(number for number, _ in SETTINGS))
        pairs = tuple((number, k) for number in tokens for k in args.accumulation or [1])
    return [(number, k, dtype) for number, k in pairs for dtype in args.dtypes]


def measure(
    num_tokens: int, accumulation: int, dtype: str, shape: Shape, args: argparse.Namespace
) -> list[Row]:
    """Compare the methods in one setting."""
    times = "" if accumulation == 1 else f"{accumulation} x "
    names = {"setting": f"{times}{num_tokens} tokens, {dtype}", "model": title(shape, args)}
    batch = make_batch(num_tokens, shape.vocab_size, args.seed)
    contenders = []
    for method in args.methods:
        model = make_model(shape, DTYPES[dtype], args.seed, args.quantization)
        contenders.append(adapt(model, method, targets="all-linear", seed=args.seed))
    if args.compiled:
        # Compiled code is cached per function, up to a limit beyond which models run uncompiled.
        torch.compiler.reset()
        rows = [row for one in contenders for row in compile_and_count(one, batch, names)]
    else:
        rows = [row for one in contenders for row in count(one, batch, accumulation, names)]
    loss = loss_of_graph if args.compiled else loss_of
    made = [
        Step(contender=one, batch=batch, loss=loss, accumulation=accumulation) for one in contenders
    ]
    steps: dict[str, Any] = {one.contender.method: one.seconds for one in made}
    measured, _ = take_turns(steps, args, **names)
    return rows + measured


def count(
    contender: Contender, batch: Tensor, accumulation: int, names: dict[str, str]
) -> list[Row]:
    """Return what is exact about a method: parameters, bytes kept for backward, column writes."""
    method, model, layers = contender.method, contender.model, linear_layers(contender.model)
    with SavedBytes(model, layers) as saved:
        loss = model(input_ids=batch, labels=batch).loss
    del loss
    rows = [
        counted("trained parameters", method, contender.num_trainable_parameters, **names),
        counted("kept for backward", method, saved.num_bytes, "bytes", **names),
    ]
    if method == OURS:
        hold_bytes(saved.num_bytes_by_kind, layers, batch.numel(), model.dtype)
        step = Step(contender=contender, batch=batch, accumulation=accumulation)
        step()
        with count_column_writes() as num_writes:
            step()
        writes = num_writes() / len(layers)
        rows.append(counted("column writes per layer", method, writes, **names))
    return rows


def compile_and_count(contender: Contender, batch: Tensor, names: dict[str, str]) -> list[Row]:
    """Compile the model in place; return what its graphs keep for backward."""
    model, method = contender.model, contender.method
    model.compile(dynamic=False)
    loss_of_graph(model, batch).backward()
    with SavedBytes(model, {}) as saved:
        loss = loss_of_graph(model, batch)
    loss.backward()
    model.zero_grad()
    return [
        counted("trained parameters", method, contender.num_trainable_parameters, **names),
        counted("kept for backward", method, saved.num_bytes, "bytes", **names),
    ]


def title(shape: Shape, args: argparse.Namespace) -> str:
    """Return what tables call the model."""
    found = f"Llama, hidden {shape.hidden_size}, {shape.num_hidden_layers} layers"
    kind = "compiled" if args.compiled else args.quantization
    return found + (f", {kind}" if kind else "")


def main(options: list[str] | None = None) -> None:
    """Measure every setting, write the result, print the ratios."""
    args = parse(options)
    prepare(args)
    shape = Shape(**{f.name: getattr(args, f.name) for f in dataclasses.fields(Shape)})
    how = (
        f"{title(shape, args)}; medians of whole steps, all methods alternating in one run, seed "
        f"{args.seed}"
    )
    made = provenance("step", how, options, args)
    rows = [row for one in choose_settings(args) for row in measure(*one, shape, args)]
    kind = args.name or ("compiled" if args.compiled else args.quantization)
    methods = {name: all_methods()[name] for name in args.methods}
    name = f"step-{kind}" if kind else "step"
    show(Result(name=name, rows=rows, methods=methods, provenance=made), args.output)


if __name__ == "__main__":
    sys.exit(main())
