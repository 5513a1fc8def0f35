"""Count what lean activations keep at each level, and their rivals; time training steps with them.

    python -m benchmarks.lean                  writes benchmarks/results/lean.json

Counts are exact and depend on no clock: bytes that one decoder layer of the size of LLaMA3-8B's
keeps for backward, per token, in units of one byte per hidden channel (a vector of hidden size is
2 in bfloat16). A layer's are those of a model of two layers minus those of a model of one, with and
without padding in the batch. The command fails if a lean PaCA keeps a byte more than its formula.
`lean_variants.py` says what is compared, torch's checkpointing and LoRA with recomputed inputs
among them.
DoRA is counted only where `--methods` names it: it keeps weights too, which no token count divides.
Times are of whole steps of a smaller model of the same proportions, all variants alternating.
"""

import argparse
import dataclasses
import sys
import time
from functools import partial
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from benchmarks.lean_variants import VARIANTS, apply_variant
from benchmarks.llama import Shape, make_batch, make_model, make_step
from benchmarks.methods import OURS, adapt, all_methods
from benchmarks.record import (
    DTYPES,
    Row,
    add_tokens,
    arguments,
    measure_all,
    prepare,
    provenance,
    take_turns,
    write,
)
from pacatune.measure.counters import SavedBytes
from pacatune.measure.timing import compare

COUNTED = ("full", "lora", "lora_dropout", OURS)
# PEFT's default is float32, for which LoRA keeps a float32 copy of each input.
ADAPTERS = {OURS: ("float32",), "lora": ("bfloat16", "float32")}
TIMED = (OURS, "lora")
TOKENS = (512, 2048)
LEVELS = {"level 1": 1, "level 2": 2, "level 3": 3}
MAX_UNITS = {"level 1": 23.5, "level 2": 9.1, "level 3": 6.1}
REFERENCE = "level 1"
# Level 1 by comparison with plain layers, all others with level 1.
MAX_RATIOS = {"level 1": 1.02, "level 2": 1.2}
# Of LLaMA3-8B; a vocabulary as large would only cost time here.
LAYER = Shape(
    hidden_size=4096,
    intermediate_size=14336,
    num_attention_heads=32,
    num_key_value_heads=8,
    vocab_size=1024,
)
SMALL = Shape(intermediate_size=1792, num_key_value_heads=2, vocab_size=4096)


def parse(options: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = arguments(__doc__, seconds=40.0)
    add_tokens(parser)
    parser.add_argument(
        "--scale", type=int, default=1, help="counts are of a layer that is so many times smaller"
    )
    parser.add_argument("--no-times", action="store_true", help="count only")
    processor = "time of this process on all processors, where others use the machine as well"
    parser.add_argument("--processor-time", action="store_true", help=processor)
    args = parser.parse_args(options)
    if args.scale < 1 or LAYER.num_key_value_heads % args.scale:
        parser.error(f"--scale ({args.scale}) must divide the {LAYER.num_key_value_heads} KV heads")
    args.tokens = args.tokens or list(TOKENS)
    return args


def count(
    method: str, adapters: str, variant: str, is_padded: bool, shape: Shape, seed: int
) -> dict[str, Any]:
    """Return what one layer keeps per token, in units, by kind of module; adapters in a dtype."""
    batch = make_batch(_NUM_COUNTED, shape.vocab_size, seed)
    units: dict[str, float] = {}
    for num_layers, sign in ((2, 1), (1, -1)):
        shape = dataclasses.replace(shape, num_hidden_layers=num_layers)
        model = make_model(shape, torch.bfloat16, seed)
        model = adapt(model, method, targets="all-linear", seed=seed).model
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.to(DTYPES[adapters])
        apply_variant(model, variant)
        for kind, num_bytes in kept(model, batch, is_padded).items():
            share = sign * num_bytes / batch.numel() / shape.hidden_size
            units[kind] = units.get(kind, 0.0) + share
    row = {"method": method, "adapters": adapters, "variant": variant, "is_padded": is_padded}
    return {**row, "units": sum(units.values()), "units_by_module": units}


_NUM_COUNTED = 256


def _counted(method: str, is_padded: bool) -> list[str]:
    """Return the variants whose bytes are counted; selective checkpointing hides what it keeps."""
    if is_padded or method == "lora_dropout":  # dropout cannot be computed again
        return ["plain", REFERENCE]
    rivals = {OURS: _RIVALS[1:], "lora": _RIVALS}.get(method, ())
    return ["plain", *LEVELS, *rivals]


_RIVALS = ("inputs", "checkpointed", "checkpointed, level 2")


def kept(model: nn.Module, batch: Tensor, is_padded: bool) -> dict[str, int]:
    """Return the bytes that a forward pass keeps, by kind of module; `others` are between them."""
    kinds = {"mlp": "mlp", "self_attn": "attention", "norm": "norms"}
    layers = {
        module: kind
        for name, module in model.named_modules()
        for end, kind in kinds.items()
        if name.rpartition(".")[2].endswith(end)
    }
    mask = torch.ones_like(batch)
    if is_padded:
        mask[:, -3:] = 0
    with SavedBytes(model, layers) as saved:
        loss = model(input_ids=batch, attention_mask=mask, labels=batch).loss
    del loss
    kept = saved.num_bytes_by_kind
    return {**kept, "others": saved.num_bytes - sum(kept.values())}


def formula_units(shape: Shape, level: int = 1, rank: int = 8) -> float:
    """Return what a lean PaCA layer keeps without padding.

    The inputs of two norms, y and the columns of o_proj; below level 3 q, k, v and their columns;
    below level 2 gate, up and theirs.
    """
    hidden, heads = shape.hidden_size, shape.num_attention_heads
    kv = hidden // heads * shape.num_key_value_heads
    elements = 2 * hidden + hidden + rank
    if level < 3:
        elements += hidden + 2 * kv + 3 * rank
    if level < 2:
        elements += 2 * shape.intermediate_size + 2 * rank
    return (2 * elements + 4 * (2 + heads)) / hidden  # rstd of two norms, sums of each head


def check(rows: list[dict[str, Any]], shape: Shape) -> None:
    """Refuse a lean PaCA that keeps more, or less, than its formula."""
    for row in rows:
        level = LEVELS.get(row["variant"])
        if row["method"] == OURS and level is not None and not row["is_padded"]:
            formula = formula_units(shape, level)
            if abs(row["units"] - formula) > 1e-6:
                raise RuntimeError(
                    f"lean paca at level {level} keeps {row['units']} units per token and layer; "
                    f"its formula gives {formula}, so something else is saved."
                )


def measure(tokens: int, dtype: str, args: argparse.Namespace) -> tuple[list[Row], list[Row]]:
    """Time steps of all variants; return a row for each and a ratio for each but the reference."""
    setting = {"setting": f"{tokens} tokens, {dtype}", "num_tokens": tokens, "dtype": dtype}
    batch = make_batch(tokens, SMALL.vocab_size, args.seed)
    methods = [method for method in args.methods or TIMED if method in TIMED]
    steps = {}
    for method in methods:
        for variant in VARIANTS:
            model = make_model(SMALL, DTYPES[dtype], args.seed)
            contender = adapt(model, method, targets="all-linear", seed=args.seed)
            apply_variant(contender.model, variant)
            clock = time.process_time if args.processor_time else time.perf_counter
            steps[method, variant] = make_step(contender, batch, 1, clock=clock)
    both = {key: {"method": key[0], "variant": key[1]} for key in steps}
    rows, times = take_turns(setting, steps, both, args)
    ratios = []
    for method, variant in steps:
        if variant == "plain":
            continue
        reference = "plain" if variant == REFERENCE else REFERENCE
        ratio = compare(times[method, variant], times[method, reference], seed=args.seed)
        names = {"method": method, "variant": variant, "reference": reference}
        target = MAX_RATIOS.get(variant)
        verdict = {"target": target, "is_reached": target is None or ratio["ratio"] <= target}
        ratios.append({**setting, **names, **ratio, **verdict})
    return rows, ratios


def units_table(rows: list[dict[str, Any]]) -> Table:
    """Return the counts as a Markdown table."""
    table = Table("method", "adapters", "padding", "variant", box=box.MARKDOWN)
    kinds = list(rows[0]["units_by_module"])
    for title in ("units", *kinds):
        table.add_column(title, justify="right")
    for row in rows:
        numbers = [row["units"], *(row["units_by_module"][kind] for kind in kinds)]
        padding = "yes" if row["is_padded"] else "no"
        cells = (f"{number:.2f}" for number in numbers)
        table.add_row(row["method"], row["adapters"], padding, row["variant"], *cells)
    return table


def times_table(ratios: list[dict[str, Any]]) -> Table:
    """Return the ratios of step times as a Markdown table."""
    table = Table("setting", "method", "variant", "by", "ratio", "95 %", box=box.MARKDOWN)
    table.add_column("of minima", justify="right")
    for ratio in ratios:
        table.add_row(
            ratio["setting"],
            *(ratio[name] for name in ("method", "variant", "reference")),
            f"{ratio['ratio']:.3f}",
            f"{ratio['low']:.2f}-{ratio['high']:.2f}",
            f"{ratio['ratio_of_minima']:.3f}",
        )
    return table


def main(options: list[str] | None = None) -> None:
    """Count, time, write the result, print the tables."""
    args = parse(options)
    prepare(args)
    console = Console(highlight=False, width=120)
    result = provenance("benchmarks.lean", args, options)
    sizes = dataclasses.asdict(LAYER)
    shape = Shape(
        **{n: v if n == "vocab_size" else max(1, v // args.scale) for n, v in sizes.items()}
    )
    counts = []
    for method in args.methods or COUNTED:
        console.print(f"counting {method} ...")
        counts += [
            count(method, adapters, variant, is_padded, shape, args.seed)
            for adapters in ADAPTERS.get(method, ("bfloat16",))
            for is_padded in (False, True)
            for variant in _counted(method, is_padded)
        ]
    check(counts, shape)
    settings = [
        (f"{tokens} tokens, {dtype}", partial(measure, tokens, dtype, args))
        for tokens in args.tokens
        for dtype in args.dtypes
    ]
    rows, ratios = measure_all([] if args.no_times else settings, console)
    names = dict.fromkeys([*(args.methods or COUNTED), *(args.methods or TIMED)])
    result |= {
        "unit": "bytes per token, layer and hidden channel",
        "layer": dataclasses.asdict(shape),
        "shape": dataclasses.asdict(SMALL),
        "methods": {name: all_methods()[name] for name in names},
        "variants": {name: description for name, (description, _) in VARIANTS.items()},
        "max_units": MAX_UNITS,
        "counts": counts,
        "rows": rows,
        "ratios": ratios,
    }
    path = write(result, args.output, "lean")
    console.print(units_table(counts))
    console.print(times_table(ratios))
    console.print(f"wrote {path}")


if __name__ == "__main__":
    sys.exit(main())
