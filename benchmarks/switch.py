"""Measure switching between two adapters over one base: set_adapter and the first forward after it.

    python -m benchmarks.switch                 writes benchmarks/results/switch.json

Neither writes a weight. PaCA adds the product of r columns to each layer's output, which are scaled
and rounded once after a switch; PEFT's LoRA multiplies by two more matrices. So the forward is also
timed without switching. The layers are those of `benchmarks.layer`, their weights in no cache.
"""

import argparse
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from peft import get_peft_model
from torch import Tensor, nn

from benchmarks.counts import count_column_writes
from benchmarks.layer import MODEL, Layers, Setting, choose_settings
from benchmarks.layer import parse as parse_layer
from benchmarks.methods import METHODS, OURS, adapter_config
from benchmarks.results import DTYPES, Result, counted, prepare, provenance, show, take_turns
from pacatune.reports.rows import Row

COMPARED = (OURS, "lora")
_ADAPTERS = ("default", "other")
_PHASES = ("set adapter", "first forward", "forward")


def parse(options: list[str] | None = None) -> argparse.Namespace:
    """Read the command line; the options are those of `benchmarks.layer`."""
    args = parse_layer(options, __doc__)
    if args.methods == list(METHODS):
        args.methods = list(COMPARED)
    if unknown := sorted(set(args.methods) - set(COMPARED)):
        raise SystemExit(f"`--methods`: {unknown} cannot be switched; choose from {COMPARED}.")
    return args


def measure(setting: Setting, args: argparse.Namespace) -> list[Row]:
    """Compare the methods in one setting; a step is a switch and the first forward after it.

    Raises:
        RuntimeError: If PaCA writes columns.
    """
    dtype, names = DTYPES[setting.dtype], {"setting": setting.label, "model": MODEL}
    inputs = [
        torch.randn(setting.num_tokens, setting.in_features).to(dtype)
        for _ in range(setting.num_layers)
    ]
    models = {method: make_model(setting, method, args.seed) for method in args.methods}
    rows = [
        counted("column writes per layer", method, count_writes(model, inputs), **names)
        for method, model in models.items()
    ]
    runs = {method: make_run(model, inputs) for method, model in models.items()}
    measured, _ = take_turns(runs, args, phases=_PHASES, num_of_step=2, **names)
    return rows + measured


def make_model(setting: Setting, method: str, seed: int) -> Any:
    """Return a PEFT model with two trained adapters of the method, on other columns each."""
    torch.manual_seed(seed)
    model: Any = Layers(setting).to(DTYPES[setting.dtype])
    for number, name in enumerate(_ADAPTERS):
        config = adapter_config(method, r"layers\.\d+", seed + number)
        if number == 0:
            model = get_peft_model(model, config)
        else:
            model.add_adapter(name, config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "paca_" in name or "lora_" in name:
                parameter.normal_(std=0.02)
    return model.eval()


def count_writes(model: nn.Module, inputs: list[Tensor]) -> int:
    """Return how often columns are written per layer when the adapter is switched and used.

    Raises:
        RuntimeError: If they are written at all: evaluation must not.
    """
    run = make_run(model, inputs)
    run()
    with count_column_writes() as num_writes:
        run()
    per_layer = num_writes() / len(inputs)
    if per_layer:
        raise RuntimeError(
            f"switching writes {per_layer} times into each layer; evaluation must not write, so "
            "something else does."
        )
    return 0


def make_run(model: Any, inputs: list[Tensor]) -> Callable[[], tuple[float, ...]]:
    """Return a function that switches, runs twice, and returns the seconds per layer and phase."""
    names = [*_ADAPTERS]

    @torch.no_grad()
    def run() -> tuple[float, ...]:
        names.reverse()
        start = time.perf_counter()
        model.set_adapter(names[0])
        switched = time.perf_counter()
        model(inputs)
        first = time.perf_counter()
        model(inputs)
        end = time.perf_counter()
        phases = (switched - start, first - switched, end - first)
        return tuple(seconds / len(inputs) for seconds in phases)

    return run


def main(options: list[str] | None = None) -> None:
    """Measure every setting, write the result, print the ratios."""
    args = parse(options)
    prepare(args)
    how = (
        f"{MODEL}: set_adapter and one forward; medians, both methods alternating in one run, seed "
        f"{args.seed}"
    )
    made = provenance("switch", how, options, args)
    rows = [row for one in choose_settings(args) for row in measure(one, args)]
    methods = {name: METHODS[name] for name in args.methods}
    show(Result(name="switch", rows=rows, methods=methods, provenance=made), args.output)


if __name__ == "__main__":
    sys.exit(main())
