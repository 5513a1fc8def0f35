"""Measure switching between two adapters over one base: set_adapter and the first forward after it.

    python -m benchmarks.switch                 writes benchmarks/results/switch.json

Neither writes a weight. PaCA adds the product of r columns to each layer's output, which are scaled
and rounded once after a switch; PEFT's LoRA multiplies by two more matrices. So the forward is also
timed without switching. The layers are those of `benchmarks.layer`, their weights in no cache.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from peft import get_peft_model
from rich.console import Console
from torch import Tensor, nn

from benchmarks.counts import count_column_writes
from benchmarks.layer import Layers, Setting, choose_settings
from benchmarks.layer import parse as parse_layer
from benchmarks.methods import METHODS, OURS, adapter_config
from benchmarks.record import DTYPES, Noise, prepare, provenance, write
from benchmarks.report import make_ratios, ratio_table
from pacatune.measure.timing import alternate, summarize

__all__ = ["main", "parse"]

COMPARED = (OURS, "lora")
_ADAPTERS = ("default", "other")
_PHASES = ("set_adapter_us", "first_forward_us", "forward_us")


def parse(options: list[str] | None = None) -> argparse.Namespace:
    """Read the command line; the options are those of `benchmarks.layer`."""
    args = parse_layer(options, __doc__)
    if args.methods == list(METHODS):
        args.methods = list(COMPARED)
    if unknown := sorted(set(args.methods) - set(COMPARED)):
        raise SystemExit(f"`--methods`: {unknown} cannot be switched; choose from {COMPARED}.")
    return args


def measure(
    setting: Setting, args: argparse.Namespace
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Compare the methods in one setting; return a row per method and a ratio per pair.

    Raises:
        RuntimeError: If PaCA writes columns.
    """
    dtype = DTYPES[setting.dtype]
    inputs = [
        torch.randn(setting.num_tokens, setting.in_features).to(dtype)
        for _ in range(setting.num_layers)
    ]
    models = {method: make_model(setting, method, args.seed) for method in args.methods}
    counts = {method: count_writes(model, inputs) for method, model in models.items()}
    runs = {method: make_run(model, inputs) for method, model in models.items()}
    noise = Noise()
    phases = alternate(
        runs, seconds=args.seconds, min_rounds=args.min_rounds, num_warmup=args.warmup
    )
    surroundings = noise.to_dict()
    times = {method: [sum(times[:2]) for times in rounds] for method, rounds in phases.items()}
    rows = [
        {
            **setting.to_dict(),
            "method": method,
            **summarize([1e3 * seconds for seconds in times[method]], "step_ms"),
            **{
                name: 1e6 * statistics.median(seconds)
                for name, seconds in zip(_PHASES, zip(*rounds, strict=True), strict=True)
            },
            "num_rounds": len(rounds),
            "column_writes_per_layer": counts[method],
            **surroundings,
        }
        for method, rounds in phases.items()
    ]
    return rows, make_ratios(setting.to_dict(), times, {}, args.seed)


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
    console = Console(highlight=False, width=120)
    rows, ratios = [], []
    result = provenance("benchmarks.switch", args, options)
    for setting in choose_settings(args):
        console.print(f"measuring {setting.label} ...")
        more_rows, more_ratios = measure(setting, args)
        rows += more_rows
        ratios += more_ratios
    result |= {
        "model": "one linear layer, caches cold: set_adapter and one forward",
        "methods": {name: METHODS[name] for name in args.methods},
        "rows": rows,
        "ratios": ratios,
    }
    path = write(result, args.output, "switch")
    console.print(ratio_table(result))
    console.print(f"wrote {path}")


if __name__ == "__main__":
    sys.exit(main())
