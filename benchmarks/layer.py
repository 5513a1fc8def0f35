"""Measure one linear layer: where forward, backward and optimizer spend their microseconds.

    python -m benchmarks.layer                 writes benchmarks/results/layer.json

Many equal layers, each with an input of its own, run one after the other, so that no weight is in
a cache when its turn comes; the times are those of all layers divided by their number. The methods
alternate as in `benchmarks.step`.
"""

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from benchmarks.counts import hold_bytes
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


def parse(
    options: list[str] | None = None, description: str | None = __doc__
) -> argparse.Namespace:
    """Read the command line."""
    parser = timed_parser(description, seconds=6.0)
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


def measure(setting: Setting, args: argparse.Namespace) -> list[Row]:
    """Compare the methods in one setting."""
    dtype, names = DTYPES[setting.dtype], {"setting": setting.label, "model": MODEL}
    inputs = [
        torch.randn(setting.num_tokens, setting.in_features).to(dtype).requires_grad_()
        for _ in range(setting.num_layers)
    ]
    contenders = [
        adapt(Layers(setting).to(dtype), method, targets=r"layers\.\d+", seed=args.seed)
        for method in args.methods
    ]
    rows = [row for one in contenders for row in count(one, inputs, names)]
    runs = {c.method: make_run(c, inputs) for c in contenders}
    measured, _ = take_turns(runs, args, phases=("forward", "backward", "optimizer"), **names)
    return rows + measured


def count(contender: Contender, inputs: list[Tensor], names: dict[str, str]) -> list[Row]:
    """Return parameters and bytes kept for backward, of all layers together."""
    layers = dict.fromkeys(_layers(contender), "linear")
    with SavedBytes(contender.model, layers) as saved:
        outputs = [layer(x) for layer, x in zip(layers, inputs, strict=True)]
    del outputs
    if contender.method == OURS:
        hold_bytes(saved.num_bytes_by_kind, layers, len(inputs[0]), inputs[0].dtype)
    method, number = contender.method, contender.num_trainable_parameters
    return [
        counted("trained parameters", method, number, **names),
        counted("kept for backward", method, saved.num_bytes, "bytes", **names),
    ]


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
    how = f"{MODEL}; medians, all methods alternating in one run, seed {args.seed}"
    made = provenance("layer", how, options, args)
    rows = [row for one in choose_settings(args) for row in measure(one, args)]
    methods = {name: all_methods()[name] for name in args.methods}
    show(Result(name="layer", rows=rows, methods=methods, provenance=made), args.output)


if __name__ == "__main__":
    sys.exit(main())
