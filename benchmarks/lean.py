"""Count what lean activations keep at each level, and their rivals; time training steps with them.

    python -m benchmarks.lean                  writes benchmarks/results/lean.json

Counts are exact and depend on no clock: bytes that one decoder layer of the size of LLaMA3-8B's
keeps for backward, per token, in units of one byte per hidden channel (a vector of hidden size is
2 in bfloat16). A layer's are those of a model of two layers minus those of a model of one. The
command fails if a lean PaCA keeps a byte more than its formula.
DoRA is counted only where `--methods` names it: it keeps weights too, which no token count divides.
Times are of whole steps of a smaller model of the same proportions, all variants alternating.

Rivals are torch's checkpointing, plain and selective, and `inputs`, the cheapest: the input of a
layer is not kept where a norm or a gated product made it, which cost next to nothing to compute
again; no projection is computed twice. NeMo Automodel's fused LoRA MLP is of this kind (it keeps x,
gate and up; here x comes from the norm's input as well). It is built of the parts that the levels
are made of.
"""

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from benchmarks.methods import METHODS, OURS, RANK, autocast_of, make_batch, make_contender
from benchmarks.results import DTYPES, compare, counted, record, take_turns, timed_parser
from pacatune import lean
from pacatune.lean.gated import apply_gated_product
from pacatune.lean.modules import LeanAttention, LeanGatedMLP
from pacatune.lean.recompute import Cut, recompute, state_of
from pacatune.measure.counters import SavedBytes
from pacatune.measure.models import checkpoint_blocks, llama_values, loss_of
from pacatune.measure.step import Step
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
VARIANTS: dict[str, tuple[str, int, str]] = {
    "plain": ("as transformers and PEFT compute", 0, ""),
    "level 1": ("pacatune.lean: what elementwise operations make is made again", 1, ""),
    "inputs": (
        "level 1, and inputs of layers from the norm's input, or from gate and up",
        1,
        "inputs",
    ),
    "level 2": ("gate and up from the norm's input", 2, ""),
    "level 3": ("query, key and value, too", 3, ""),
    "selective": (
        "level 1, and torch's selective checkpointing of blocks, keeping what level 2 keeps",
        1,
        "selective",
    ),
    "checkpointed": ("level 1, and torch's checkpointing of blocks", 1, "checkpointed"),
    "checkpointed, level 2": ("level 2, and torch's checkpointing of blocks", 2, "checkpointed"),
}
"""Name -> description, level, and what else is done to keep less."""
_NUM_COUNTED = 256
_RIVALS = ("inputs", "checkpointed", "checkpointed, level 2")
_ATTENTION = (
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
)


def apply_variant(model: Any, variant: str) -> None:
    """Let a model, with its adapter, keep what one of `VARIANTS` keeps; in place."""
    _, level, rival = VARIANTS[variant]
    if level:
        lean.enable(model, mode="require", level=level)
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    if rival == "inputs":
        _recompute_inputs(model)
    elif rival == "checkpointed":
        checkpoint_blocks(base)
    elif rival == "selective":
        policy = partial(_keep, base.config.intermediate_size)
        context = partial(create_selective_checkpoint_contexts, policy)
        options = {"use_reentrant": False, "context_fn": context}
        enable = getattr(base, "activation_checkpointing_enable", None)
        (enable or base.gradient_checkpointing_enable)(options)


def _keep(width: int, context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """Keep attention, and products that the MLP has no part in: what level 2 keeps, and o_proj."""
    is_product = op in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
    is_narrow = is_product and not any(width in x.shape for x in args if isinstance(x, Tensor))
    if op in _ATTENTION or is_narrow:
        return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE


def _recompute_inputs(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, LeanGatedMLP):
            module.forward = partial(_mlp, module)
        elif isinstance(module, LeanAttention):
            module.forward = partial(_attention, module, module.forward)


def _mlp(module: Any, x: Tensor) -> Tensor:
    names, parts = module.settings, module._modules
    activation, down = names.activation, parts[names.down]

    def project(x: Tensor, cut: Cut) -> Tensor:
        (x,) = cut(x)
        with cut.casts():
            gate, up = parts[names.gate](x), parts[names.up](x)
        return recompute(multiply, [gate, up], state_of(down))

    def multiply(gate: Tensor, up: Tensor, cut: Cut) -> Tensor:
        (h,) = cut(apply_gated_product(gate, up, activation))
        with cut.casts():
            y: Tensor = down(h)
        return y

    return recompute(project, [x], state_of(module))


def _attention(module: nn.Module, run: Callable[..., Any], **kwargs: Any) -> Any:
    x = kwargs.pop("hidden_states")

    def body(x: Tensor, cut: Cut) -> Tensor:
        (x,) = cut(x)
        with cut.casts():
            y: Tensor = run(x, **kwargs)[0]
        return y

    return recompute(body, [x], state_of(module)), None


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
    """Return the variants whose bytes are counted; selective checkpointing hides what it keeps."""
    if method == "lora_dropout":  # dropout cannot be computed again
        return ["plain", REFERENCE]
    rivals = {OURS: _RIVALS[1:], "lora": _RIVALS, "lora_bf16": _RIVALS}.get(method, ())
    return ["plain", *LEVELS, *rivals]


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
    record("lean", how, run, args, options, methods)


if __name__ == "__main__":
    sys.exit(main())
