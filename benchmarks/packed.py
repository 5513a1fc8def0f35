"""Measure what tuning survives in a file of 4 bits that llama.cpp serves.

    python -m benchmarks.packed                writes benchmarks/results/packed.json; an hour
    python -m benchmarks.packed --quick        one task, one seed, fewer steps and rows

The model is SmolLM2-135M-Instruct as somebody's GGUF (Q4_1). PaCA and LoRA train on the file in
bfloat16, as transformers dequantises it. PaCA's columns become codes of the same file; LoRA is
merged, and every matrix of the blocks is quantised again by gguf, or it is served beside the file.

A score is the share of held-out answers that greedy decoding gives: as trained by transformers, of
the file by llama.cpp. Rates are a grid with a factor of three, from low ones to beyond the best; a
method's rate is the one with the least loss of what is served, of the first seed, on rows that
neither train nor test. Each training with its measurements is kept in --work: a run that was
stopped goes on.

The program of commit ca84c0e0 has more, which was measured once, at r = 8: full fine-tuning, other
formats, LoRA on the scales of the file, columns that are rounded to codes while they train, speeds
of what is served, and a model that is quantised after training.
"""

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import gguf
import gguf.quants
import torch
from safetensors.torch import load_file

from benchmarks.llama_cpp import answers
from benchmarks.results import at_least_1, counted, mean_row, new_parser, record
from examples.packaged import default_cache, prepare
from pacatune.adapters.loading import load_language_model
from pacatune.grid.checkpoint import FileColumns
from pacatune.grid.gguf import GgufCheckpoint
from pacatune.patch.packed import merge_packed
from pacatune.reports.rows import Row
from pacatune.training import RunConfig, train

METHODS = {
    "paca": "PaCA, r = 16; its columns as codes of the file",
    "lora": "PEFT's LoRA, r = 16; merged, and quantised again by gguf",
}
RATES = {"paca": (1e-3, 3e-3, 9e-3, 2.7e-2), "lora": (2e-3, 6e-3, 1.8e-2)}
SIZES = {"paca": {"r": 16, "paca_alpha": 16}, "lora": {"r": 16, "lora_alpha": 32}}
BESIDE = "lora, beside"
TASKS = {"words reversed": "reverse-words", "words sorted": "sort-words"}
FORMAT = "Q4_1"
_NUM_CHOOSING = 50


def rows_of(task: str, part: str) -> list[dict[str, str]]:
    """Return the rows of a task: lists of words, to be reversed or sorted."""
    path = default_cache() / TASKS[task] / f"{part}.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def run_of(
    method: str, model: Path, data: Path, rate: float, seed: int, steps: int, output: Path
) -> RunConfig:
    """Return the run of a method on the file."""
    sizes = SIZES[method] | ({"random_seed": seed} if method == "paca" else {})
    return RunConfig(
        method=method,
        model={"path": str(model), "dtype": "bfloat16"},
        data={"path": str(data), "eval_fraction": 0, "seed": seed},
        lean="off",
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
        **{method: sizes},
    )


def stored(file: Path) -> Iterator[tuple[str, Any]]:
    """Yield the name of each matrix of the blocks, and what the file has of it."""
    checkpoint = GgufCheckpoint.open(file)
    model: Any = load_language_model(str(file), dtype="bfloat16").model
    for module, layer in model.get_decoder().named_modules(prefix="model"):
        if isinstance(layer, torch.nn.Linear):
            columns, name = torch.arange(layer.in_features), f"{module}.weight"
            yield module, FileColumns(checkpoint, name, layer.weight, columns, model.config)


def requantised(file: Path, trained: Any, output: Path) -> None:
    """Write a copy of a file in which the blocks' matrices are a model's, quantised again."""
    content, checkpoint = bytearray(file.read_bytes()), GgufCheckpoint.open(file)
    for module, matrix in stored(file):
        entry = checkpoint.entries[matrix.name]
        after = trained.get_submodule(module).weight.detach().float()[matrix.order].contiguous()
        kind = gguf.GGMLQuantizationType[entry.dtype]
        data = gguf.quants.quantize(after.numpy(), kind).tobytes()
        content[entry.start : entry.start + entry.num_bytes] = data
    output.write_bytes(content)


def write_beside(file: Path, adapter: Path, output: Path) -> None:
    """Write a LoRA adapter as the GGUF that llama.cpp serves beside a file."""
    config = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    tensors = load_file(adapter / "adapter_model.safetensors")
    writer = gguf.GGUFWriter(str(output), GgufCheckpoint.open(file).architecture)
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", float(config["lora_alpha"]))
    for module, matrix in stored(file):
        a, b = (tensors[f"base_model.model.{module}.lora_{x}.weight"].float() for x in "AB")
        writer.add_tensor(f"{matrix.name}.lora_a", a.contiguous().numpy())
        writer.add_tensor(f"{matrix.name}.lora_b", b[matrix.order].contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write(method: str, file: Path, adapter: Path, output: Path) -> None:
    """Write what is served of an adapter."""
    if method == "paca":
        merge_packed(file, adapter, output, verify=False)
    else:
        adapted: Any = load_language_model(str(file), adapter, dtype="bfloat16").model
        requantised(file, adapted.merge_and_unload(), output)


@torch.no_grad()
def teacher_forced(
    rows: list[dict[str, str]], file: Path, adapter: Path | None = None
) -> dict[str, float]:
    """Return the share of answers whose every token is the likeliest, in %, and the mean loss."""
    loaded = load_language_model(str(file), adapter, dtype="bfloat16")
    model, tokenizer = loaded.model.eval(), loaded.tokenizer
    matches, losses = 0, 0.0
    for row in rows:
        prompt = tokenizer(row["prompt"])["input_ids"]
        ids = tokenizer(row["prompt"] + row["completion"])["input_ids"]
        ids = [*ids, tokenizer.eos_token_id]
        logits = model(input_ids=torch.tensor([ids])).logits[0, len(prompt) - 1 : -1].float()
        wanted = torch.tensor(ids[len(prompt) :])
        matches += bool((logits.argmax(-1) == wanted).all())
        losses += float(torch.nn.functional.cross_entropy(logits, wanted))
    return {"score": 100 * matches / len(rows), "loss": losses / len(rows)}


def served(
    file: Path, rows: list[dict[str, str]], threads: int, beside: Path | None = None
) -> float:
    """Return the share of answers that llama.cpp gives, in per cent."""
    texts = answers(file, [row["prompt"] for row in rows], 48, threads, beside)
    matches = [text == row["completion"] for text, row in zip(texts, rows, strict=True)]
    return 100 * sum(matches) / len(matches)


def changed_bytes(before: Path, after: Path) -> int:
    """Return how many bytes of two files of one size differ."""
    pair = (torch.frombuffer(bytearray(p.read_bytes()), dtype=torch.uint8) for p in (before, after))
    return int(torch.ne(*pair).sum())


def cell(
    file: Path, task: str, method: str, rate: float, seed: int, args: argparse.Namespace
) -> dict[str, float]:
    """Train once; return scores and losses, as trained and of the file."""
    name = f"{task.replace(' ', '-')}-{method}-{rate:g}-{seed}-{args.steps}-{args.rows}.json"
    kept = args.work / name
    if kept.is_file():
        numbers: dict[str, float] = json.loads(kept.read_text(encoding="utf-8"))
        return numbers
    test, rows = rows_of(task, "test")[: args.rows], rows_of(task, "train")
    choosing, rows = rows[:_NUM_CHOOSING], rows[_NUM_CHOOSING:]
    with tempfile.TemporaryDirectory() as scratch:
        data, adapter, output = (Path(scratch, n) for n in ("train.jsonl", "run", "tuned.gguf"))
        data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        train(run_of(method, file, data, rate, seed, args.steps, adapter))
        write(method, file, adapter, output)
        numbers = {
            "score as trained": teacher_forced(test, file, adapter)["score"],
            "loss as trained": teacher_forced(choosing, file, adapter)["loss"],
            "score": served(output, test, args.threads),
            "loss": teacher_forced(choosing, output)["loss"],
            "bytes changed": 100 * changed_bytes(file, output) / file.stat().st_size,
        }
        if method == "lora":
            write_beside(file, adapter, lora := output.with_name("lora.gguf"))
            numbers["score beside"] = served(file, test, args.threads, lora)
    kept.write_text(json.dumps(numbers), encoding="utf-8")
    print(kept.stem, json.dumps(numbers), flush=True)
    return numbers


def measure(args: argparse.Namespace) -> Iterator[Row]:
    """Train, write, serve and score every method on every task."""
    for name in ("smollm2-gguf", *TASKS.values()):
        prepare(name)
    file = default_cache() / "smollm2-135m-instruct-gguf" / "model.gguf"
    args.work.mkdir(parents=True, exist_ok=True)
    # transformers asks for it once per tensor, and it takes 20 ms.
    gguf.get_tensor_name_map = cache(gguf.get_tensor_name_map)
    for task in args.tasks:
        names = {"model": "SmolLM2-135M", "setting": f"{FORMAT}, {task}"}
        score = served(file, rows_of(task, "test")[: args.rows], args.threads)
        yield Row(what="score", method="base", value=score, unit="%", **names)
        for method in METHODS:
            rates = RATES[method] if len(args.seeds) > 1 else RATES[method][-1:]
            first = {rate: cell(file, task, method, rate, args.seeds[0], args) for rate in rates}
            best = min(rates, key=lambda rate: first[rate]["loss"])
            cells = {str(seed): cell(file, task, method, best, seed, args) for seed in args.seeds}
            note = f"{method}, {FORMAT}, {task}: learning rate {best:g}."
            for what in ("score as trained", "score", "loss as trained", "loss"):
                each, unit = (
                    {seed: numbers[what] for seed, numbers in cells.items()},
                    "%" * ("score" in what),
                )
                yield mean_row(what, method, each, note, unit=unit, **names)
            if method == "lora":
                each = {seed: numbers["score beside"] for seed, numbers in cells.items()}
                yield mean_row("score", BESIDE, each, unit="%", **names)
            share = statistics.mean(numbers["bytes changed"] for numbers in cells.values())
            yield counted("bytes changed", method, share, "%", **names)
            for rate, numbers in first.items():
                each_rate = names | {"setting": f"{names['setting']}, learning rate {rate:g}"}
                for what, key in (("as trained", "score as trained"), ("in the file", "score")):
                    what = f"first seed, {what}"
                    yield Row(what=what, method=method, value=numbers[key], unit="%", **each_rate)


def main(options: list[str] | None = None) -> None:
    """Measure, write the result, print it."""
    parser = new_parser(__doc__, is_timed=True)
    add = parser.add_argument
    add("--quick", action="store_true", help="one task and seed; fewer steps and rows")
    add("--seeds", nargs="+", type=int, default=[0, 1, 2])
    add("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    add("--steps", type=at_least_1, default=40)
    add("--rows", type=at_least_1, default=100, help="held-out rows that are scored")
    add("--work", type=Path, default=default_cache() / "packed", help="where runs are kept")
    args = parser.parse_args(options)
    if args.quick:
        args.tasks, args.seeds, args.steps, args.rows = list(TASKS)[:1], [0], 10, 20
    how = (
        f"{args.steps} steps of 8 rows, bfloat16, all linear layers; scores of {args.rows} "
        f"held-out rows, seeds {', '.join(map(str, args.seeds))}"
    )
    methods = METHODS | {BESIDE: "not merged: served beside the file"}
    record("packed", how, lambda: list(measure(args)), args, options, methods)


if __name__ == "__main__":
    sys.exit(main())
