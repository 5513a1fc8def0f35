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
from collections.abc import Callable

import torch
from torch import Tensor, nn

from benchmarks.lean_variants import VARIANTS, apply_variant
from benchmarks.llama import Shape, make_batch, make_model
from benchmarks.methods import OURS, adapt, all_methods
from benchmarks.results import (
    DTYPES,
    Result,
    counted,
    prepare,
    provenance,
    show,
    take_turns,
    timed_parser,
)
from pacatune.measure.counters import SavedBytes
from pacatune.measure.step import Step
from pacatune.reports.rows import Row

COUNTED = ("full", "lora", "lora_dropout", OURS)
# PEFT's default is float32, for which LoRA keeps a float32 copy of each input.
ADAPTERS = {OURS: ("float32",), "lora": ("bfloat16", "float32")}
TIMED = (OURS, "lora")
TOKENS = (512, 2048)
LEVELS = {"level 1": 1, "level 2": 2, "level 3": 3}
REFERENCE = "level 1"
WHAT = "kept per token and layer"
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
    parser = timed_parser(__doc__, seconds=40.0)
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
) -> Row:
    """Return what one layer keeps per token, in bytes per channel; adapters in a dtype."""
    batch = make_batch(_NUM_COUNTED, shape.vocab_size, seed)
    units = 0.0
    for num_layers, sign in ((2, 1), (1, -1)):
        shape = dataclasses.replace(shape, num_hidden_layers=num_layers)
        model = make_model(shape, torch.bfloat16, seed)
        model = adapt(model, method, targets="all-linear", seed=seed).model
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.to(DTYPES[adapters])
        apply_variant(model, variant)
        units += sign * kept(model, batch, is_padded) / batch.numel() / shape.hidden_size
    level = LEVELS.get(variant)
    if method == OURS and level is not None and not is_padded:
        formula = formula_units(shape, level)
        if abs(units - formula) > 1e-6:
            raise RuntimeError(
                f"lean paca at level {level} keeps {units} bytes per token, layer and channel; its "
                f"formula gives {formula}, so something else is saved."
            )
    what = f"{WHAT}, padded" if is_padded else WHAT
    finer = ", float32 adapters" if adapters == "float32" and method != OURS else ""
    return counted(what, method + finer, units, "bytes per channel", setting=variant)


_NUM_COUNTED = 256


def _counted(method: str, is_padded: bool) -> list[str]:
    """Return the variants whose bytes are counted; selective checkpointing hides what it keeps."""
    if is_padded or method == "lora_dropout":  # dropout cannot be computed again
        return ["plain", REFERENCE]
    rivals = {OURS: _RIVALS[1:], "lora": _RIVALS}.get(method, ())
    return ["plain", *LEVELS, *rivals]


_RIVALS = ("inputs", "checkpointed", "checkpointed, level 2")


def kept(model: nn.Module, batch: Tensor, is_padded: bool) -> int:
    """Return the bytes that a forward pass keeps."""
    mask = torch.ones_like(batch)
    if is_padded:
        mask[:, -3:] = 0
    with SavedBytes(model, {}) as saved:
        loss = model(input_ids=batch, attention_mask=mask, labels=batch).loss
    del loss
    return saved.num_bytes


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


def measure(tokens: int, dtype: str, args: argparse.Namespace) -> list[Row]:
    """Time steps of all variants; return a ratio for each but the reference, by method."""
    batch = make_batch(tokens, SMALL.vocab_size, args.seed)
    steps: dict[str, Callable[[], float]] = {}
    pairs: dict[tuple[str, str], str] = {}
    for method in (method for method in args.methods or TIMED if method in TIMED):
        for variant in VARIANTS:
            model = make_model(SMALL, DTYPES[dtype], args.seed)
            contender = adapt(model, method, targets="all-linear", seed=args.seed)
            apply_variant(contender.model, variant)
            clock = time.process_time if args.processor_time else time.perf_counter
            step = Step(contender=contender, batch=batch, clock=clock)
            steps[f"{method}: {variant}"] = step.seconds
            if variant != "plain":
                reference = "plain" if variant == REFERENCE else REFERENCE
                pairs[f"{method}: {variant}", f"{method}: {reference}"] = method
    rows, _ = take_turns(steps, args, pairs=pairs, setting=f"{tokens} tokens, {dtype}")
    ratios = [row for row in rows if row.unit == "ratio"]
    return [
        dataclasses.replace(row, method=method, what=row.method.replace(f"{method}: ", ""))
        for row, method in zip(ratios, pairs.values(), strict=True)
    ]


def main(options: list[str] | None = None) -> None:
    """Count, time, write the result, print it."""
    args = parse(options)
    prepare(args)
    sizes = dataclasses.asdict(LAYER)
    shape = Shape(
        **{n: v if n == "vocab_size" else max(1, v // args.scale) for n, v in sizes.items()}
    )
    clock = "processor time, " if args.processor_time else ""
    how = (
        f"Counts at the size of a layer of LLaMA3-8B; steps of a smaller model of its proportions, "
        f"{clock}all variants alternating in one run"
    )
    made = provenance("lean", how, options, args)
    rows = [
        count(method, adapters, variant, is_padded, shape, args.seed)
        for method in args.methods or COUNTED
        for adapters in ADAPTERS.get(method, ("bfloat16",))
        for is_padded in (False, True)
        for variant in _counted(method, is_padded)
    ]
    for tokens in () if args.no_times else args.tokens:
        for dtype in args.dtypes:
            rows += measure(tokens, dtype, args)
    names = dict.fromkeys([*(args.methods or COUNTED), *(args.methods or TIMED)])
    methods = {name: all_methods()[name] for name in names}
    methods |= {name: description for name, (description, _) in VARIANTS.items()}
    show(Result(name="lean", rows=rows, methods=methods, provenance=made), args.output)


if __name__ == "__main__":
    sys.exit(main())
