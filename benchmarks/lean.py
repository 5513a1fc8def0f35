"""Count what lean activations keep at each level, and their rivals; time training steps with them.

    python -m benchmarks.lean                  writes benchmarks/results/lean-part.json

Counts are exact and depend on no clock: bytes that one decoder layer of the size of LLaMA3-8B's
keeps for backward, per token, in units of one byte per hidden channel (a vector of hidden size is
2 in bfloat16). A layer's are those of a model of two layers minus those of a model of one. The
command fails if a lean PaCA keeps a byte more than its formula.
DoRA is counted only where `--methods` names it: it keeps weights too, which no token count divides.
Times are of whole steps of a smaller model of the same proportions, all variants alternating.

The rival is torch's checkpointing of blocks. lean.json is of commit 9793dfab7; its program has two
more, measured once: torch's selective checkpointing, and `inputs`, which computes inputs of layers
again from a norm's input, or from gate and up.
"""

import argparse
import sys
import time
from dataclasses import replace
from typing import Any

import torch

from benchmarks.methods import METHODS, OURS, RANK, autocast_of, make_batch, make_contender
from benchmarks.models import llama_values, loss_of
from benchmarks.results import DTYPES, compare, counted, record, take_turns, timed_parser
from benchmarks.timing import Step
from pacatune import lean
from pacatune.measure.counters import SavedBytes
from pacatune.measure.models import checkpoint_blocks
from pacatune.reports.rows import Row

COUNTED = ("full", "lora", "lora_bf16", "lora_dropout", OURS)
TIMED = (OURS, "lora")
TOKENS = (512, 2048)
LEVELS = ("level 1", "level 2", "level 3")
REFERENCE = LEVELS[0]
WHAT = "kept per token and layer"
# Of LLaMA3-8B; a vocabulary as large would only cost time here.
LAYER = llama_values(4096, 2, num_kv_heads=8, intermediate_size=14336, vocab_size=1024)
SMALL = llama_values(512, 8, num_kv_heads=2, intermediate_size=1792)
VARIANTS: dict[str, tuple[str, int, bool]] = {
    "plain": ("as transformers and PEFT compute", 0, False),
    "level 1": ("pacatune.lean: what elementwise operations make is made again", 1, False),
    "level 2": ("gate and up from the norm's input", 2, False),
    "level 3": ("query, key and value, too", 3, False),
    "checkpointed": ("level 1, and torch's checkpointing of blocks", 1, True),
    "checkpointed, level 2": ("level 2, and torch's checkpointing of blocks", 2, True),
}
"""Name -> description, level, and whether blocks are checkpointed."""
_NUM_COUNTED = 256


def apply_variant(model: Any, variant: str) -> None:
    """Let a model, with its adapter, keep what one of `VARIANTS` keeps; in place."""
    _, level, is_checkpointed = VARIANTS[variant]
    if level:
        lean.enable(model, mode="require", level=level)
    if is_checkpointed:
        checkpoint_blocks(model.get_base_model() if hasattr(model, "get_base_model") else model)


def count(method: str, variant: str, values: dict[str, Any], seed: int) -> Row:
    """Return what one layer keeps per token, in bytes per channel."""
    batch = make_batch(_NUM_COUNTED, values["vocab_size"], seed)
    units = 0.0
    for num_layers, sign in ((2, 1), (1, -1)):
        sized = values | {"num_hidden_layers": num_layers}
        model = make_contender(method, sized, torch.bfloat16, seed).model
        apply_variant(model, variant)
        with torch.autocast("cpu", torch.bfloat16), SavedBytes(model) as saved:
            loss = loss_of(model, batch)
        del loss
        units += sign * saved.num_bytes / batch.numel() / values["hidden_size"]
    if method == OURS and variant in LEVELS:
        formula = formula_units(values, VARIANTS[variant][1])
        if abs(units - formula) > 1e-6:
            raise RuntimeError(
                f"lean paca at {variant} keeps {units} bytes per token, layer and channel; its "
                f"formula gives {formula}, so something else is saved."
            )
    return counted(WHAT, method, units, "bytes per channel", setting=variant)


def counted_variants(method: str) -> list[str]:
    """Return the variants whose bytes are counted."""
    if method == "lora_dropout":  # dropout cannot be computed again
        return ["plain", REFERENCE]
    return ["plain", *LEVELS] if method == "full" else list(VARIANTS)


def formula_units(values: dict[str, Any], level: int = 1, rank: int = RANK) -> float:
    """Return what a lean PaCA layer keeps without padding.

    The inputs of two norms, y and the columns of o_proj; below level 3 q, k, v and their columns;
    below level 2 gate, up and theirs.
    """
    hidden, heads = values["hidden_size"], values["num_attention_heads"]
    kv = hidden // heads * values["num_key_value_heads"]
    elements = 2 * hidden + hidden + rank
    if level < 3:
        elements += hidden + 2 * kv + 3 * rank
    if level < 2:
        elements += 2 * values["intermediate_size"] + 2 * rank
    return (2 * elements + 4 * (2 + heads)) / hidden  # rstd of two norms, sums of each head


def measure(method: str, tokens: int, dtype: str, args: argparse.Namespace) -> list[Row]:
    """Time steps of all variants of a method; return their ratios, each named by its pair."""
    batch = make_batch(tokens, SMALL["vocab_size"], args.seed)
    clock = time.process_time if args.processor_time else time.perf_counter
    steps = {}
    for variant in VARIANTS:
        contender = make_contender(method, SMALL, DTYPES[dtype], args.seed)
        apply_variant(contender.model, variant)
        step = Step(
            contender=contender, batch=batch, clock=clock, autocast=autocast_of(DTYPES[dtype])
        )
        steps[variant] = step.seconds
    pairs = [(v, "plain" if v == REFERENCE else REFERENCE) for v in VARIANTS if v != "plain"]
    rows = compare(take_turns(steps, args), args.seed, pairs, setting=f"{tokens} tokens, {dtype}")
    return [replace(row, method=method, what=row.method) for row in rows if row.unit == "ratio"]


def main(options: list[str] | None = None) -> None:
    """Count, time, write the result, print it."""
    parser = timed_parser(__doc__, seconds=40.0)
    processor = "time of this process on all processors, where others use the machine as well"
    parser.add_argument("--processor-time", action="store_true", help=processor)
    parser.set_defaults(tokens=list(TOKENS))
    args = parser.parse_args(options)
    chosen = args.methods or COUNTED
    timed = [method for method in args.methods or TIMED if method in TIMED]
    clock = "processor time, " if args.processor_time else ""
    how = (
        f"Counts at the size of a layer of LLaMA3-8B; steps of a smaller model of its proportions, "
        f"{clock}all variants of a method alternating in one run"
    )

    def run() -> list[Row]:
        counts = [
            count(method, variant, LAYER, args.seed)
            for method in chosen
            for variant in counted_variants(method)
        ]
        settings = [(tokens, dtype) for tokens in args.tokens for dtype in args.dtypes]
        return counts + [
            row for one in settings for method in timed for row in measure(method, *one, args)
        ]

    methods = {name: METHODS[name] for name in chosen}
    methods |= {name: description for name, (description, *_) in VARIANTS.items()}
    record("lean-part", how, run, args, options, methods)


if __name__ == "__main__":
    sys.exit(main())
