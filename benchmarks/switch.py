"""Measure switching between two adapters over one base: set_adapter and the first forward after it.

    python -m benchmarks.switch                 writes benchmarks/results/switch.json

Neither writes a weight. PaCA adds the product of r columns to each layer's output, which are scaled
and rounded once after a switch; PEFT's LoRA multiplies by two more matrices. So the forward is also
timed without switching. Many equal layers, each with an input of its own, run one after the other,
so that no weight is in a cache when its turn comes; times are those of all divided by their number.
"""

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from peft import get_peft_model
from torch import Tensor, nn

from benchmarks.counts import count_column_writes
from benchmarks.methods import METHODS, OURS, adapter_config
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
from pacatune.reports.rows import Row

SHAPES = ("512x512", "1408x512", "512x1408")
TOKENS = (16, 512)
MODEL = "one linear layer, caches cold"
# All weights together are larger than the last-level cache of one core complex.
_CHAIN_BYTES = 40 * 2**20


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What one comparison is made with."""

    out_features: int
    in_features: int
    num_tokens: int
    dtype: str
    num_layers: int

    @property
    def label(self) -> str:
        """What tables call it."""
        shape = f"{self.out_features} x {self.in_features}"
        return f"weight {shape}, {self.num_tokens} tokens, {self.dtype}"


class Layers(nn.Module):
    """Equal linear layers without a bias."""

    def __init__(self, setting: Setting) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Linear(setting.in_features, setting.out_features, bias=False)
            for _ in range(setting.num_layers)
        )

    def forward(self, inputs: list[Tensor]) -> list[Tensor]:
        """Apply each layer to its own input."""
        return [layer(x) for layer, x in zip(self.layers, inputs, strict=True)]


COMPARED = (OURS, "lora")
_ADAPTERS = ("default", "other")
_PHASES = ("set adapter", "first forward", "forward")


def parse(options: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = timed_parser(__doc__, seconds=6.0, methods=COMPARED)
    parser.set_defaults(methods=list(COMPARED))
    parser.add_argument(
        "--shapes", nargs="+", type=_shape, default=[*map(_shape, SHAPES)], metavar="OUTxIN"
    )
    parser.add_argument(
        "--num-layers", type=at_least_1, help="instead of as many as it takes to empty the caches"
    )
    return parser.parse_args(options)


def _shape(text: str) -> tuple[int, int]:
    try:
        out_features, in_features = (int(number) for number in text.split("x"))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"must be OUTxIN, such as 512x1408, got {text!r}"
        ) from None
    return out_features, in_features


def choose_settings(args: argparse.Namespace) -> list[Setting]:
    """Return every combination of shape, tokens and dtype."""
    return [
        Setting(
            out_features=out_features,
            in_features=in_features,
            num_tokens=number,
            dtype=dtype,
            num_layers=args.num_layers or _num_cold_layers(out_features * in_features, dtype),
        )
        for out_features, in_features in args.shapes
        for number in args.tokens or TOKENS
        for dtype in args.dtypes
    ]


def _num_cold_layers(num_elements: int, dtype: str) -> int:
    return max(2, _CHAIN_BYTES // (num_elements * DTYPES[dtype].itemsize))


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
