"""Count what lean activations keep at each level, and their rivals.

    python -m benchmarks.lean                  writes benchmarks/results/lean-part.json

Counts are exact and depend on no clock: bytes that one decoder layer of the size of LLaMA3-8B's
keeps for backward, per token, in units of one byte per hidden channel (a vector of hidden size is
2 in bfloat16). A layer's are those of a model of two layers minus those of a model of one. The
command fails if a lean PaCA keeps a byte more than its formula.

The rival is torch's checkpointing of blocks. lean.json is of commit 9793dfab7; its program has more
that was measured once: times of steps, torch's selective checkpointing, and `inputs`, which
computes inputs of layers again from a norm's input, or from gate and up.
"""

import sys
from typing import Any

import torch

from benchmarks.methods import METHODS, OURS, RANK, make_contender
from benchmarks.models import llama_values, make_batch
from benchmarks.results import counted, new_parser, record
from benchmarks.timing import Step
from pacatune import lean
from pacatune.measure.models import checkpoint_blocks
from pacatune.reports.rows import Row

COUNTED = ("full", "lora", "lora_bf16", "lora_dropout", OURS)
LEVELS = ("level 1", "level 2", "level 3")
WHAT = "kept per token and layer"
# Of LLaMA3-8B; a vocabulary as large would only cost time here.
LAYER = llama_values(4096, 2, num_kv_heads=8, intermediate_size=14336, vocab_size=1024)
VARIANTS: dict[str, tuple[str, int, bool]] = {
    "plain": ("as transformers and PEFT compute", 0, False),
    "level 1": ("pacatune.lean: results of elementwise operations are recomputed", 1, False),
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


def count(method: str, variant: str, values: dict[str, Any]) -> Row:
    """Return what one layer keeps per token, in bytes per channel."""
    batch = make_batch(1, _NUM_COUNTED, values["vocab_size"], 0)
    units = 0.0
    for num_layers, sign in ((2, 1), (1, -1)):
        sized = values | {"num_hidden_layers": num_layers}
        contender = make_contender(method, sized, torch.bfloat16)
        apply_variant(contender.model, variant)
        step = Step(contender=contender, batch=batch, autocast=torch.bfloat16)
        units += sign * step.kept_bytes() / batch.numel() / values["hidden_size"]
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
        return ["plain", "level 1"]
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


def main(options: list[str] | None = None) -> None:
    """Count, write the result, print it."""
    args = new_parser(__doc__).parse_args(options)

    def run() -> list[Row]:
        return [
            count(method, variant, LAYER)
            for method in COUNTED
            for variant in counted_variants(method)
        ]

    methods = {name: METHODS[name] for name in COUNTED}
    methods |= {name: description for name, (description, *_) in VARIANTS.items()}
    record("lean-part", "Of a layer of the size of LLaMA3-8B's", run, args, options, methods)


if __name__ == "__main__":
    sys.exit(main())
