"""Measure one linear layer: where forward, backward and optimizer spend their microseconds.

    python -m benchmarks.layer                 writes benchmarks/results/layer.json

Many equal layers, each with an input of its own, run one after the other, so that no weight is in
a cache when its turn comes; the times are those of all layers divided by their number. The methods
alternate as in `benchmarks.step`.
"""

import argparse
import dataclasses
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

from benchmarks.counts import check_bytes, formula_bytes
from benchmarks.methods import METHODS, OURS, adapt, all_methods
from benchmarks.record import (
    DTYPES,
    Noise,
    add_tokens,
    arguments,
    at_least_1,
    prepare,
    provenance,
    write,
)
from benchmarks.report import make_ratios, ratio_table
from pacatune.measure.counters import SavedBytes
from pacatune.measure.device import peak_process_bytes
from pacatune.measure.methods import Contender
from pacatune.measure.timing import alternate, summarize

SHAPES = ("512x512", "1408x512", "512x1408")
TOKENS = (16, 512)
# All weights together are larger than the last-level cache of one core complex.
_CHAIN_BYTES = 40 * 2**20
_PHASES = ("forward_us", "backward_us", "optimizer_us")


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

    def to_dict(self) -> dict[str, Any]:
        """Return the fields, and the label as `setting`."""
        return {"setting": self.label, **dataclasses.asdict(self)}


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


def parse(
    options: list[str] | None = None, description: str | None = __doc__
) -> argparse.Namespace:
    """Read the command line."""
    parser = arguments(description, seconds=6.0)
    add_tokens(parser)
    parser.add_argument(
        "--shapes", nargs="+", type=_shape, default=[*map(_shape, SHAPES)], metavar="OUTxIN"
    )
    parser.add_argument(
        "--num-layers", type=at_least_1, help="instead of as many as it takes to empty the caches"
    )
    args = parser.parse_args(options)
    args.methods = args.methods or list(METHODS)
    return args


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


def measure(
    setting: Setting, args: argparse.Namespace
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Compare the methods in one setting; return a row per method and a ratio per pair."""
    dtype = DTYPES[setting.dtype]
    inputs = [
        torch.randn(setting.num_tokens, setting.in_features).to(dtype).requires_grad_()
        for _ in range(setting.num_layers)
    ]
    contenders = [
        adapt(Layers(setting).to(dtype), method, targets=r"layers\.\d+", seed=args.seed)
        for method in args.methods
    ]
    counts = {c.method: count(c, inputs) for c in contenders}
    runs = {c.method: make_run(c, inputs) for c in contenders}
    noise = Noise()
    phases = alternate(
        runs, seconds=args.seconds, min_rounds=args.min_rounds, num_warmup=args.warmup
    )
    surroundings = noise.to_dict()
    times = {method: [sum(times) for times in rounds] for method, rounds in phases.items()}
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
            **surroundings,
            **counts[method],
        }
        for method, rounds in phases.items()
    ]
    return rows, make_ratios(setting.to_dict(), times, {}, args.seed)


def count(contender: Contender, inputs: list[Tensor]) -> dict[str, Any]:
    """Return parameters and bytes kept for backward, of all layers together."""
    layers = dict.fromkeys(_layers(contender), "linear")
    with SavedBytes(contender.model, layers) as saved:
        outputs = [layer(x) for layer, x in zip(layers, inputs, strict=True)]
    del outputs
    counts: dict[str, Any] = {
        "num_trainable_parameters": contender.num_trainable_parameters,
        "saved_bytes": saved.num_bytes,
        "saved_bytes_by_layer": saved.num_bytes_by_kind,
    }
    if contender.method == OURS:
        counts["formula_bytes_by_layer"] = formula_bytes(layers, len(inputs[0]), inputs[0].dtype)
    return counts


def make_run(contender: Contender, inputs: list[Tensor]) -> Callable[[], tuple[float, ...]]:
    """Return a function that runs all layers once and returns the seconds per layer and phase."""
    layers, optimizer = _layers(contender), contender.optimizer
    with torch.no_grad():
        gradients = [torch.randn_like(layer(x)) for layer, x in zip(layers, inputs, strict=True)]

    def run() -> tuple[float, ...]:
        start = time.perf_counter()
        outputs = [layer(x) for layer, x in zip(layers, inputs, strict=True)]
        forward = time.perf_counter()
        torch.autograd.backward(outputs, gradients)
        backward = time.perf_counter()
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad()
        end = time.perf_counter()
        for x in inputs:
            x.grad = None
        phases = (forward - start, backward - forward, end - backward)
        return tuple(seconds / len(layers) for seconds in phases)

    return run


def _layers(contender: Contender) -> list[nn.Module]:
    (layers,) = (m for m in contender.model.modules() if isinstance(m, nn.ModuleList))
    return list(layers)


def main(options: list[str] | None = None) -> None:
    """Measure every setting, write the result, print the ratios."""
    args = parse(options)
    prepare(args)
    console = Console(highlight=False, width=120)
    rows, ratios = [], []
    result = provenance("benchmarks.layer", args, options)
    for setting in choose_settings(args):
        console.print(f"measuring {setting.label} ...")
        more_rows, more_ratios = measure(setting, args)
        rows += more_rows
        ratios += more_ratios
    check_bytes(rows)
    result |= {
        "model": "one linear layer, caches cold",
        "methods": {name: all_methods()[name] for name in args.methods},
        "peak_process_bytes": peak_process_bytes(),
        "rows": rows,
        "ratios": ratios,
    }
    path = write(result, args.output, "layer")
    console.print(ratio_table(result))
    console.print(f"wrote {path}")


if __name__ == "__main__":
    sys.exit(main())
