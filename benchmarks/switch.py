"""Measure switching between two adapters over one base: set_adapter and the first forward after it.

    python -m benchmarks.switch                 writes benchmarks/results/switch.json

Neither writes a weight. PaCA adds the product of r columns to each layer's output, which are scaled
and rounded once after a switch; PEFT's LoRA multiplies by two more matrices. Many equal layers,
each with an input of its own, run one after the other, so that no weight is in a cache when its
turn comes; times are those of all divided by their number.
"""

import argparse
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from benchmarks.methods import OURS, RANK
from benchmarks.results import DTYPES, compare, record, take_turns, timed_parser
from pacatune import PacaConfig
from pacatune.reports.rows import Row

SHAPES = ((512, 512), (1408, 512), (512, 1408))
"""Outputs and inputs of a layer."""
TOKENS = (16, 512)
COMPARED = (OURS, "lora")
MODEL = "one linear layer, caches cold"
# All weights together are larger than the last-level cache of one core complex.
CHAIN_BYTES = 40 * 2**20
_ADAPTERS = ("default", "other")


class Layers(nn.Module):
    """Equal linear layers without a bias."""

    def __init__(self, shape: tuple[int, int], dtype: torch.dtype) -> None:
        super().__init__()
        out_features, in_features = shape
        num_layers = max(2, CHAIN_BYTES // (out_features * in_features * dtype.itemsize))
        self.layers = nn.ModuleList(
            nn.Linear(in_features, out_features, bias=False, dtype=dtype) for _ in range(num_layers)
        )

    def forward(self, inputs: list[Tensor]) -> list[Tensor]:
        """Apply each layer to its own input."""
        return [layer(x) for layer, x in zip(self.layers, inputs, strict=True)]


def measure(
    shape: tuple[int, int], num_tokens: int, dtype: str, args: argparse.Namespace
) -> list[Row]:
    """Compare the methods in one setting; a step is a switch and the first forward after it."""
    setting = f"weight {shape[0]} x {shape[1]}, {num_tokens} tokens, {dtype}"
    names = {"setting": setting, "model": MODEL}
    models = {m: make_model(shape, m, DTYPES[dtype], args.seed) for m in args.methods}
    num_layers = len(models[args.methods[0]].layers)
    inputs = [torch.randn(num_tokens, shape[1]).to(DTYPES[dtype]) for _ in range(num_layers)]
    times = take_turns({m: make_run(model, inputs) for m, model in models.items()}, args)
    return compare(times, args.seed, **names)


def make_model(shape: tuple[int, int], method: str, dtype: torch.dtype, seed: int) -> Any:
    """Return a PEFT model with two trained adapters of the method, on other columns each."""
    torch.manual_seed(seed)
    model: Any = Layers(shape, dtype)
    for number, name in enumerate(_ADAPTERS):
        options: dict[str, Any] = {"r": RANK, "target_modules": r"layers\.\d+"}
        config = (
            PacaConfig(**options, paca_alpha=RANK, random_seed=seed + number)
            if method == OURS
            else LoraConfig(**options, lora_alpha=RANK)
        )
        if number == 0:
            model = get_peft_model(model, config)
        else:
            model.add_adapter(name, config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "paca_" in name or "lora_" in name:
                parameter.normal_(std=0.02)
    return model.eval()


def make_run(model: Any, inputs: list[Tensor]) -> Callable[[], float]:
    """Return a function that switches, runs, and returns the seconds per layer."""
    names = [*_ADAPTERS]

    @torch.no_grad()
    def run() -> float:
        names.reverse()
        start = time.perf_counter()
        model.set_adapter(names[0])
        model(inputs)
        return (time.perf_counter() - start) / len(inputs)

    return run


def main(options: list[str] | None = None) -> None:
    """Measure every setting, write the result, print the ratios."""
    parser = timed_parser(__doc__, seconds=6.0, methods=COMPARED)
    parser.set_defaults(methods=list(COMPARED), tokens=list(TOKENS))
    args = parser.parse_args(options)
    how = (
        f"{MODEL}: set_adapter and one forward; medians, both methods alternating in one run, seed "
        f"{args.seed}"
    )

    def run() -> list[Row]:
        return [
            row
            for shape in SHAPES
            for number in args.tokens
            for dtype in args.dtypes
            for row in measure(shape, number, dtype, args)
        ]

    record("switch", how, run, args, options, args.methods)


if __name__ == "__main__":
    sys.exit(main())
