"""Measure whole training steps of a small Llama: PaCA against every other method.

    python -m benchmarks.step                  writes benchmarks/results/step.json
    python -m benchmarks.step --compiled       writes benchmarks/results/step-compiled.json
    python -m benchmarks.step --channels       writes benchmarks/results/step-channels.json

A step is forward, backward and optimizer: with `--accumulation 4`, four micro-batches and one
optimizer step. All methods alternate in one process, one step each per round, and ratios are those
of the medians over the rounds. The exact counts beside them (bytes kept for backward, writes of
columns) do not depend on the machine.
"""

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import product
from typing import Any
from unittest.mock import patch

import torch

from benchmarks.methods import (
    MAX_LENGTH,
    METHODS,
    OURS,
    RANK,
    USUAL,
    VALUES,
    make_contender,
)
from benchmarks.models import loss_of, loss_of_graph, make_batch
from benchmarks.results import (
    at_least_1,
    compare,
    counted,
    new_parser,
    record,
    take_turns,
)
from benchmarks.timing import Step
from pacatune.precision import bfloat16_is_fast
from pacatune.reports.rows import Row
from pacatune.residency import put as residency
from pacatune.tuner.layer import PacaLayer

# Tokens per micro-batch and micro-batches per optimizer step, unless options say otherwise.
SETTINGS = ((16, 1), (16, 4), (512, 1), (2048, 1))
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
COMPILED_METHODS = (OURS, "lora", "lora_bf16")
DIAL = (OURS, "channels", "all_channels")
RIVALS = ("frozen", "lora", "lora_bf16")


def parse(options: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = new_parser(__doc__, is_timed=True)
    add = parser.add_argument
    known = list(METHODS)
    add("--methods", nargs="+", choices=known, metavar="NAME", help="None: the usual ones")
    fast = [name for name in DTYPES if name != "bfloat16" or bfloat16_is_fast(use_cpu=True)]
    hardware = "by default those that this processor multiplies in hardware"
    add("--dtypes", nargs="+", default=fast, choices=list(DTYPES), help=hardware)
    add("--tokens", nargs="+", type=at_least_1, metavar="N", help="per micro-batch; None: as usual")
    add("--seconds", type=float, default=40.0, help="time for each setting, warm-up excluded")
    add("--min-rounds", type=at_least_1, default=5, help="rounds at the least")
    add("--warmup", type=int, default=2, help="rounds before, not counted")
    add("--accumulation", nargs="+", type=at_least_1, metavar="K", help="micro-batches per step")
    compiled = "compare under torch.compile; needs a C++ compiler"
    form = parser.add_mutually_exclusive_group().add_argument
    form("--compiled", action="store_true", help=compiled)
    form("--channels", action="store_true", help="compare all forms of the dial with LoRA")
    sizes = {name: size for name, size in VALUES.items() if type(size) is int}
    for name, size in sizes.items():
        option = "--" + name.replace("_", "-")
        add(option, type=at_least_1, default=size, help="size of the Llama")
    args = parser.parse_args(options)
    for number in args.tokens or ():
        if number > MAX_LENGTH and number % MAX_LENGTH:
            parser.error(f"`--tokens` ({number}), above {MAX_LENGTH}, must be a multiple of it.")
    usual = COMPILED_METHODS if args.compiled else (*DIAL, *RIVALS) if args.channels else USUAL
    args.methods = args.methods or list(usual)
    args.values = VALUES | {name: getattr(args, name) for name in sizes}
    return args


def choose_settings(args: argparse.Namespace) -> list[tuple[int, int, str]]:
    """Return tokens, micro-batches and dtype: the standard ones, or all that are given."""
    pairs: tuple[tuple[int, int], ...] = SETTINGS
    if args.tokens or args.accumulation:
        tokens = args.tokens or list(dict.fromkeys(number for number, _ in SETTINGS))
        pairs = tuple((number, k) for number in tokens for k in args.accumulation or [1])
    return [(number, k, dtype) for number, k in pairs for dtype in args.dtypes]


def measure(num_tokens: int, accumulation: int, dtype: str, args: argparse.Namespace) -> list[Row]:
    """Compare the methods in one setting."""
    times = "" if accumulation == 1 else f"{accumulation} x "
    names = {"setting": f"{times}{num_tokens} tokens, {dtype}", "model": title(args)}
    num_rows = max(1, num_tokens // MAX_LENGTH)
    batch = make_batch(num_rows, num_tokens // num_rows, args.vocab_size, args.seed)
    steps = {
        method: Step(
            contender=make_contender(method, args.values, DTYPES[dtype], args.seed),
            batch=batch,
            loss=loss_of_graph if args.compiled else loss_of,
            autocast=None if dtype == "float32" else DTYPES[dtype],
            accumulation=accumulation,
        )
        for method in args.methods
        if method != "lora_bf16" or dtype == "bfloat16"
    }
    if args.compiled:
        # Compiled code is cached per function, up to a limit beyond which models run uncompiled.
        torch.compiler.reset()
        for step in steps.values():
            step.contender.model.compile(dynamic=False)
            step.forward().backward()
            step.contender.model.zero_grad()
    rows = [row for step in steps.values() for row in count(step, args.compiled, names)]
    runs = {method: step.seconds for method, step in steps.items()}
    pairs = [pair for pair in product(DIAL, RIVALS) if runs.keys() >= {*pair}]
    return rows + compare(
        take_turns(runs, args), args.seed, pairs if args.channels else None, **names
    )


def count(step: Step, is_compiled: bool, names: dict[str, str]) -> list[Row]:
    """Return what is exact about a method: parameters, bytes kept for backward, column writes."""
    contender = step.contender
    method, model = contender.method, contender.model
    rows = [
        counted("trained parameters", method, contender.num_trainable_parameters, **names),
        counted("kept for backward", method, step.kept_bytes(), "bytes", **names),
    ]
    if method == OURS and not is_compiled:
        num_layers = sum(isinstance(module, PacaLayer) for module in model.modules())
        step()
        with count_column_writes() as num_writes:
            step()
        per_layer = num_writes() / num_layers
        rows.append(counted("column writes per layer", method, per_layer, **names))
    return rows


@contextmanager
def count_column_writes() -> Iterator[Callable[[], int]]:
    """Count how often columns are written into a weight, restoring included."""
    write, done = residency.put_columns_, []

    def counting(*args: Any) -> None:
        # A mock would keep the arguments; a held alias of a weight forbids writing it.
        done.append(None)
        write(*args)

    with patch.object(residency, "put_columns_", counting):
        yield lambda: len(done)


def title(args: argparse.Namespace) -> str:
    """Return what tables call the model."""
    found = f"Llama, hidden {args.hidden_size}, {args.num_hidden_layers} layers"
    return found + ", compiled" * args.compiled


def main(options: list[str] | None = None) -> None:
    """Measure every setting, write the result, print the ratios."""
    args = parse(options)
    how = (
        f"{title(args)}; rank {RANK}; medians of whole steps, all methods alternating in one run, "
        f"seed {args.seed}"
    )

    def run() -> list[Row]:
        return [row for one in choose_settings(args) for row in measure(*one, args)]

    form = "-compiled" if args.compiled else "-channels" if args.channels else ""
    record(f"step{form}", how, run, args, options, args.methods)


if __name__ == "__main__":
    sys.exit(main())
