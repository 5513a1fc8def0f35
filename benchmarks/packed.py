"""Measure what tuning survives in a file of 4 bits: codes of trained columns, and LoRA.

    python -m benchmarks.packed                writes benchmarks/results/packed.json
    python -m benchmarks.packed --quick        one task, one seed, fewer steps and rows

The model exists in 4 bits alone: SmolLM2-135M-Instruct as somebody's GGUF (Q4_1). Both methods
train on it in bfloat16, as transformers dequantises it. PaCA's columns then become codes of the
same file (`pacatune merge`); LoRA is merged, and all weights that it changes are quantised again by
the package gguf, the reference of Q4_1. A score is the share of held-out answers that greedy
decoding gives, by transformers: as trained, and of the written file. Each method's rate is the best
of its grid by the loss as trained, of the first seed, on rows that neither trains nor measures.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.results import at_least_1, counted, new_parser, record
from examples.packaged import default_cache, prepare
from pacatune.adapters.base import load_base
from pacatune.adapters.loading import load_language_model
from pacatune.grid.gguf import GgufCheckpoint, name_of, row_order
from pacatune.patch.packed import merge_packed
from pacatune.reports.rows import Row, spread_of_mean
from pacatune.training import RunConfig, train

RATES = {"paca": (3e-3, 9e-3), "lora": (2e-3, 6e-3)}
RANKS = {"paca": 8, "lora": 4}  # about as many trained parameters
TASKS = ("words reversed", "words sorted")
MODEL = "SmolLM2-135M, Q4_1"
_NUM_TEST, _NUM_CHOOSING = 200, 100
METHODS = {
    "paca": "PaCA, r = 8; its columns as codes of the file",
    "lora": "PEFT's LoRA, r = 4; merged, and its weights quantised again",
}


def rows_of(task: str, part: str) -> list[dict[str, str]]:
    """Return the rows of a task: lists of words, to be reversed or sorted."""
    path = default_cache() / "reverse-words" / f"{part}.jsonl"
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    if task == "words reversed":
        return rows
    found = []
    for row in rows:
        words = row["prompt"].removeprefix("Reverse: ").removesuffix("\nReversed:").split(", ")
        prompt = f"Sort: {', '.join(words)}\nSorted:"
        found.append({"prompt": prompt, "completion": f" {', '.join(sorted(words))}"})
    return found


def run_of(
    method: str, model: Path, data: Path, rate: float, seed: int, steps: int, output: Path
) -> RunConfig:
    """Return the run of a method on the file."""
    section: dict[str, Any] = {"paca": {"r": RANKS["paca"], "paca_alpha": 16, "random_seed": seed}}
    if method == "lora":
        section = {"lora": {"r": RANKS["lora"], "lora_alpha": 8}}
    return RunConfig(
        method=method,
        model={"path": str(model), "dtype": "bfloat16"},
        data={"path": str(data), "eval_fraction": 0, "seed": seed},
        training={
            "output_dir": str(output),
            "max_steps": steps,
            "per_device_train_batch_size": 8,
            "learning_rate": rate,
            "warmup_steps": 4,
            "eval_strategy": "no",
            "save_strategy": "no",
            "report_to": "none",
            "seed": seed,
        },
        **section,
    )


@torch.no_grad()
def score(model: Any, tokenizer: Any, rows: list[dict[str, str]]) -> tuple[float, float]:
    """Return the share of answers that greedy decoding gives, in per cent, and the mean loss."""
    model.eval()
    matches, losses = 0, 0.0
    for row in rows:
        prompt = tokenizer(row["prompt"])["input_ids"]
        ids = tokenizer(row["prompt"] + row["completion"])["input_ids"]
        ids = [*ids, tokenizer.eos_token_id]
        logits = model(input_ids=torch.tensor([ids])).logits[0, len(prompt) - 1 : -1].float()
        wanted = torch.tensor(ids[len(prompt) :])
        matches += bool((logits.argmax(-1) == wanted).all())
        losses += float(torch.nn.functional.cross_entropy(logits, wanted))
    return 100 * matches / len(rows), losses / len(rows)


def requantise(base: Path, merged: Any, names: list[str], output: Path) -> None:
    """Write a copy of a file in which some weights are those of a model, quantised again."""
    from gguf import GGMLQuantizationType
    from gguf.quants import quantize

    checkpoint, config = GgufCheckpoint.open(base), merged.config
    plain: Any = load_base(str(base), task_type="CAUSAL_LM", dtype="bfloat16")
    heads = (config.num_attention_heads, config.num_key_value_heads)
    content = bytearray(base.read_bytes())
    for module in names:
        name = name_of(checkpoint, f"{module}.weight", config.num_hidden_layers)
        entry, grid = checkpoint.entries[name], checkpoint.grid(name)
        every = torch.arange(entry.shape[1])
        assert grid is not None
        values = grid.values(checkpoint.rows(name), every)
        order = row_order(values, plain.get_submodule(module).weight.detach(), heads, name)
        weight: Tensor = merged.get_submodule(module).weight.detach().float()[order]
        data = quantize(weight.contiguous().numpy(), GGMLQuantizationType[entry.dtype]).tobytes()
        assert len(data) == entry.num_bytes
        content[entry.start : entry.start + entry.num_bytes] = data
    output.write_bytes(content)


def written(method: str, base: Path, adapter: Path, folder: Path) -> Path:
    """Write the tuned file of a method; return its path."""
    output = folder / f"{method}.gguf"
    if method == "paca":
        merge_packed(base, adapter, output, verify=False)
        return output
    loaded: Any = load_language_model(str(base), adapter, dtype="bfloat16")
    names = [
        name.removeprefix("base_model.model.")
        for name, module in loaded.model.named_modules()
        if hasattr(module, "lora_A")
    ]
    requantise(base, loaded.model.merge_and_unload(), names, output)
    return output


def changed_bytes(before: Path, after: Path) -> int:
    """Return how many bytes of two files of one size differ."""
    pair = (torch.frombuffer(bytearray(p.read_bytes()), dtype=torch.uint8) for p in (before, after))
    return int(torch.ne(*pair).sum())


def scores_of(path: Path, adapter: Path | None, rows: list[dict[str, str]]) -> tuple[float, float]:
    """Return the score and the loss of a file, or of an adapter on it."""
    loaded: Any = load_language_model(str(path), adapter, dtype="bfloat16")
    return score(loaded.model, loaded.tokenizer, rows)


def measure(args: argparse.Namespace) -> list[Row]:
    """Train, write and score every method on every task."""
    for name in ("smollm2-gguf", "reverse-words"):
        prepare(name)
    base = default_cache() / "smollm2-135m-instruct-gguf" / "model.gguf"
    return [row for task in args.tasks for row in _of_task(task, base, args)]


def _of_task(task: str, base: Path, args: argparse.Namespace) -> Iterator[Row]:
    test, rows = rows_of(task, "test")[: args.rows], rows_of(task, "train")
    choosing, rows = rows[:_NUM_CHOOSING], rows[_NUM_CHOOSING:]
    names: dict[str, Any] = {"model": MODEL, "setting": task}
    before = scores_of(base, None, test)
    yield Row(what="score of the base", method="base", value=before[0], unit="%", **names)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        data = folder / "train.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        for method in METHODS:
            best, losses = RATES[method][-1], dict[float, float]()
            for rate in RATES[method] if len(args.seeds) > 1 else ():
                output = folder / f"{method}-choosing-{rate:g}"
                train(run_of(method, base, data, rate, args.seeds[0], args.steps, output))
                _, losses[rate] = scores_of(base, output, choosing)
                best = min(losses, key=lambda rate: losses[rate])
            found: dict[str, dict[str, float]] = {"as trained": {}, "in the file": {}}
            sizes = []
            for seed in args.seeds:
                output = folder / f"{method}-{seed}"
                train(run_of(method, base, data, best, seed, args.steps, output))
                tuned = written(method, base, output, folder)
                found["as trained"][str(seed)], _ = scores_of(base, output, test)
                found["in the file"][str(seed)], _ = scores_of(tuned, None, test)
                sizes.append(changed_bytes(base, tuned))
                tuned.unlink()
                print(task, method, seed, best, found, flush=True)
            for what, each in found.items():
                mean, ends = sum(each.values()) / len(each), {}
                if len(each) > 1:
                    spread = spread_of_mean([*each.values()])
                    ends = {"low": mean - spread, "high": mean + spread}
                yield Row(
                    what=f"score {what}",
                    method=method,
                    value=mean,
                    unit="%",
                    n=len(each),
                    each=each,
                    note=f"{method}, {task}: learning rate {best:g}.",
                    **ends,
                    **names,
                )
            share = 100 * sum(sizes) / len(sizes) / base.stat().st_size
            yield counted("bytes changed", method, share, "%", **names)


def main(options: list[str] | None = None) -> None:
    """Measure, write the result, print it."""
    parser = new_parser(__doc__, is_timed=True)
    add = parser.add_argument
    add("--quick", action="store_true", help="one task, one seed, fewer steps and rows")
    add("--seeds", nargs="+", type=int, default=[0, 1, 2])
    add("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    add("--steps", type=at_least_1, default=40)
    add("--rows", type=at_least_1, default=_NUM_TEST, help="held-out rows that are scored")
    args = parser.parse_args(options)
    if args.quick:
        args.tasks, args.seeds, args.steps, args.rows = list(TASKS[:1]), [0], 10, 20
    how = (
        f"{MODEL}: {args.steps} steps of 8 rows, bfloat16, all linear layers; scores of "
        f"{args.rows} held-out rows by transformers, seeds {', '.join(map(str, args.seeds))}"
    )
    record("packed", how, lambda: measure(args), args, options, METHODS)


if __name__ == "__main__":
    sys.exit(main())
