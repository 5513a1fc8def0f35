"""Measure what tuning survives in a file of few bits, and what it costs there.

    python -m benchmarks.packed                writes benchmarks/results/packed.json
    python -m benchmarks.packed --quick        one format, one task, one seed, fewer steps and rows:
                                               packed-part.json

The model exists in few bits alone: SmolLM2-135M-Instruct as somebody's GGUF (Q4_1), and two files
that the package gguf makes of it (Q8_0, Q4_0). Every method trains on the file in bfloat16, as
transformers dequantises it, full fine-tuning in float32. Then (`FORMS`) PaCA's columns become codes
of the same file; LoRA is merged and what it changed is quantised again, by gguf's quantiser or to
the nearest codes of the scales that are there, or is served beside the file; full fine-tuning is
quantised again.

Plan and rule. A score is the share of held-out answers that greedy decoding gives: as trained by
transformers, of the file by llama.cpp. Rates are a grid with a factor of three, from low ones to
beyond the best; a form's rate is the one with the least loss of what is served, of the first seed,
on rows that neither train nor test, in the first format. Target: 95 % of the gain as trained in 4
bits, 99 % in 8; ahead of LoRA quantised again by more than the spread of both. A form that keeps
less than half leaves. So did `paca, on the grid`, which rounded columns to codes in every step and
had to win somewhere: its rows are of commit ca84c0e0.

Each training with its measurements is a cell, kept in --work: a run that was stopped goes on.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import gguf
import gguf.quants
import torch
from transformers import AutoModelForSequenceClassification

from benchmarks.llama_cpp import answers
from benchmarks.packed_files import (
    FORMATS,
    FORMS,
    base_file,
    base_of,
    changed_bytes,
)
from benchmarks.results import at_least_1, counted, mean_row, new_parser, record
from examples.packaged import default_cache, prepare
from pacatune.adapters.base import load_base
from pacatune.adapters.merge import merge
from pacatune.measure.timing import ratio_row
from pacatune.patch import apply_in_place, make
from pacatune.reports.rows import Row
from pacatune.training import RunConfig, train
from pacatune.training.config_file import load_yaml
from pacatune.training.held_out import HeldOut

RATES = {
    "paca": (1e-3, 3e-3, 9e-3, 2.7e-2),
    "lora": (2e-3, 6e-3, 1.8e-2),
    "full": (3e-5, 1e-4, 3e-4, 1e-3),
}
RANKS = {"paca": 8, "lora": 4}  # about as many trained parameters
TASKS = {"words reversed": "reverse-words", "words sorted": "sort-words"}
_FIRST_FORMAT_ALONE = ("lora, scales kept", "full")
MODEL = "SmolLM2-135M"
_RATES_AFTER = (7e-4, 2e-3, 6e-3)
_NUM_CHOOSING = 50
_SPEED_TOKENS, _SPEED_TURNS = 64, 24


def rows_of(task: str, part: str) -> list[dict[str, str]]:
    """Return the rows of a task: lists of words, to be reversed or sorted."""
    path = default_cache() / TASKS[task] / f"{part}.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _options(method: str, rate: float, seed: int, steps: int, output: Path) -> dict[str, Any]:
    """Return the options of a run that do not depend on model and data."""
    sections: dict[str, Any] = {
        "paca": {"paca": {"r": RANKS["paca"], "paca_alpha": 16, "random_seed": seed}},
        "lora": {"lora": {"r": RANKS["lora"], "lora_alpha": 2 * RANKS["lora"]}},
        "full": {},
    }
    training = {
        "output_dir": str(output),
        "max_steps": steps,
        "per_device_train_batch_size": 8,
        "learning_rate": rate,
        "warmup_steps": 4,
        "eval_strategy": "no",
        "save_strategy": "no",
        "report_to": "none",
        "seed": seed,
    }
    return {"method": method, "training": training, "lean": "off", **sections[method]}


def run_of(
    method: str, model: Path, data: Path, rate: float, seed: int, steps: int, output: Path
) -> RunConfig:
    """Return the run of a method on the file."""
    return RunConfig(
        # All weights in bfloat16 would lose most of their steps by rounding.
        model={"path": str(model), "dtype": "float32" if method == "full" else "bfloat16"},
        data={"path": str(data), "eval_fraction": 0, "seed": seed},
        **_options(method, rate, seed, steps, output),
    )


@torch.no_grad()
def teacher_forced(model: Any, tokenizer: Any, rows: list[dict[str, str]]) -> dict[str, float]:
    """Return the share of answers whose every token is the likeliest, in %, and the mean loss."""
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
    return {"score": 100 * matches / len(rows), "loss": losses / len(rows)}


def served(file: Path, beside: Path | None, rows: list[dict[str, str]], threads: int) -> float:
    """Return the share of answers that llama.cpp gives, in per cent."""
    requests = [(row["prompt"], 48, {}) for row in rows]
    told = answers([(file, beside)], requests, threads)
    matches = [t[0] == row["completion"] for (t,), row in zip(told, rows, strict=True)]
    return 100 * sum(matches) / len(matches)


def cell(
    kind: str, task: str, method: str, rate: float, seed: int, args: argparse.Namespace
) -> dict[str, dict[str, float]]:
    """Train once and measure every form of it; by form, and `as trained`."""
    name = f"{kind}-{task.replace(' ', '-')}-{method}-{rate:g}-{seed}-{args.steps}-{args.rows}.json"
    kept = args.work / name
    if kept.is_file():
        found: dict[str, dict[str, float]] = json.loads(kept.read_text(encoding="utf-8"))
        return found
    base = base_of(kind, args.work)
    test, rows = rows_of(task, "test")[: args.rows], rows_of(task, "train")
    choosing, rows = rows[:_NUM_CHOOSING], rows[_NUM_CHOOSING:]
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        data, adapter, output = (folder / name for name in ("train.jsonl", "run", "tuned.gguf"))
        data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        train(run_of(method, base.file, data, rate, seed, args.steps, adapter))
        trained = (
            load_base(str(adapter), task_type="CAUSAL_LM", dtype="bfloat16")
            if method == "full"
            else base.with_adapter(adapter)
        )
        loss = teacher_forced(trained, base.tokenizer, choosing)["loss"]
        found = {"as trained": teacher_forced(trained, base.tokenizer, test) | {"choosing": loss}}
        for title, form in FORMS.items():
            if form.method != method:
                continue
            beside = form.write(base, adapter, output)
            file = base.file if beside else output
            each = {"score": served(file, beside, test, args.threads), "choosing": loss}
            if beside is None:
                written = teacher_forced(base.with_file(file), base.tokenizer, choosing)
                each |= {"choosing": written["loss"], "bytes": changed_bytes(base.file, file)}
            found[title] = each
    kept.write_text(json.dumps(found), encoding="utf-8")
    print(kept.stem, json.dumps(found), flush=True)
    return found


def measure(args: argparse.Namespace) -> list[Row]:
    """Train, write, serve and score every method on every task in every format."""
    for name in ("smollm2-gguf", *TASKS.values()):
        prepare(name)
    args.work.mkdir(parents=True, exist_ok=True)
    # transformers asks for it once per tensor, and it takes 20 ms.
    gguf.get_tensor_name_map = cache(gguf.get_tensor_name_map)
    rows = [
        row for kind in args.formats for task in args.tasks for row in _of_task(kind, task, args)
    ]
    if not args.quick:
        rows += _kept(args.work / "costs.json", lambda: [*_costs(args)])
        rows += _kept(args.work / "after.json", lambda: [*_quantised_after(args)])
    return rows


def _kept(path: Path, measure: Callable[[], list[Row]]) -> list[Row]:
    """Return rows that were measured before, or measure them."""
    if not path.is_file():
        text = json.dumps([row.to_dict() for row in measure()])
        path.write_text(text, encoding="utf-8")
    return [Row(**row) for row in json.loads(path.read_text(encoding="utf-8"))]


def _of_task(kind: str, task: str, args: argparse.Namespace) -> Iterator[Row]:
    base = base_file(kind, args.work)
    names: dict[str, Any] = {"model": MODEL, "setting": f"{kind}, {task}"}
    kept = args.work / f"{kind}-{task.replace(' ', '-')}-base-{args.rows}.json"
    yield from _kept(kept, lambda: [*_before(kind, task, args, names)])
    others = () if kind == FORMATS[0] else _FIRST_FORMAT_ALONE
    for title in (form for form in args.forms if form not in others):
        method = FORMS[title].method
        rates = RATES[method] if len(args.seeds) > 1 else RATES[method][-1:]
        # The other formats take the rates of the first.
        first = {rate: cell(FORMATS[0], task, method, rate, args.seeds[0], args) for rate in rates}
        best = min(rates, key=lambda rate: first[rate][title]["choosing"])
        cells = {str(seed): cell(kind, task, method, best, seed, args) for seed in args.seeds}
        for key, name, unit in (("score", "score", "%"), ("choosing", "loss", "")):
            for what, part in ((f"{name} as trained", "as trained"), (name, title)):
                each = {seed: found[part][key] for seed, found in cells.items()}
                note = f"{title}, {kind}, {task}: learning rate {best:g}."
                yield mean_row(what, title, each, note, unit=unit, **names)
        sizes = [found[title]["bytes"] for found in cells.values() if "bytes" in found[title]]
        if sizes:
            share = 100 * statistics.mean(sizes) / base.stat().st_size
            yield counted("bytes changed", title, share, "%", **names)
        for rate, found in first.items() if kind == FORMATS[0] else ():
            each_rate = names | {"setting": f"{kind}, {task}, learning rate {rate:g}"}
            for what, part in (("as trained", "as trained"), ("in the file", title)):
                score = found[part]["score"]
                yield Row(
                    what=f"first seed, {what}", method=title, value=score, unit="%", **each_rate
                )


def _before(kind: str, task: str, args: argparse.Namespace, names: Any) -> Iterator[Row]:
    """Measure a file that nobody has tuned."""
    base, test = base_of(kind, args.work), rows_of(task, "test")[: args.rows]
    score = served(base.file, None, test, args.threads)
    yield Row(what="score", method="base", value=score, unit="%", **names)
    choosing = rows_of(task, "train")[:_NUM_CHOOSING]
    loss = teacher_forced(base.model, base.tokenizer, choosing)["loss"]
    yield Row(what="loss", method="base", value=loss, **names)


def _costs(args: argparse.Namespace) -> Iterator[Row]:
    """Measure tokens per second of what is served, in turns, and how long a change takes.

    `base again` is another copy of the base: what differs between equal files.
    """
    for kind in args.formats[:1]:
        base = base_of(kind, args.work)
        names: dict[str, Any] = {"model": MODEL, "setting": kind}
        yield counted("file", "base", base.file.stat().st_size, "bytes", **names)
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch)
            data, output = folder / "train.jsonl", folder / "tuned.gguf"
            some = rows_of(next(iter(TASKS)), "train")[:64]
            data.write_text("".join(json.dumps(row) + "\n" for row in some), encoding="utf-8")
            for method in ("paca", "lora"):
                rate = RATES[method][-1]
                train(run_of(method, base.file, data, rate, 0, 2, folder / method))
            beside = FORMS["lora, beside"].write(base, folder / "lora", output)
            FORMS["paca"].write(base, folder / "paca", output)
            copy = folder / "copy.gguf"  # as new as the tuned file
            again = folder / "again.gguf"
            for path in (copy, again):
                path.write_bytes(base.file.read_bytes())
            servers = {"base": (copy, None), "paca": (output, None), "base again": (again, None)}
            servers["lora, beside"] = (copy, beside)
            request = ("The words are", _SPEED_TOKENS, {"ignore_eos": True})
            told = [*answers([*servers.values()], [request] * (_SPEED_TURNS + 1), args.threads)][1:]
            times = {name: [1 / turn[i][1] for turn in told] for i, name in enumerate(servers)}
            for name in list(servers)[1:]:
                yield ratio_row(
                    times[name], times["base"], seed=args.seed, what="time per token",
                    method=f"{name} / base", **names,
                )  # fmt: skip
            rate_of_base = statistics.median(1 / seconds for seconds in times["base"])
            yield Row(what="speed", method="base", value=rate_of_base, unit="tokens/s", **names)
            patch, _ = make(base.file, folder / "paca")
            seconds = []
            for turn in range(6):
                start = time.perf_counter()
                apply_in_place(copy, patch, revert=bool(turn % 2))
                seconds.append(time.perf_counter() - start)
            assert copy.read_bytes() == base.file.read_bytes()
            yield Row(
                what="patch applied or taken out", method="paca", value=statistics.median(seconds),
                unit="s", n=len(seconds), **names,
            )  # fmt: skip


def _quantised_after(args: argparse.Namespace) -> Iterator[Row]:
    """Measure the other situation: a 16-bit model is tuned, merged, and then quantised once."""
    prepare("minilm-questions")
    task = load_yaml((default_cache() / "minilm-questions.yaml").read_text(encoding="utf-8"))
    names: dict[str, Any] = {"model": "MiniLM-L6", "setting": "types of questions, Q4_1 after"}
    q4 = gguf.GGMLQuantizationType.Q4_1

    def losses(method: str, rate: float, seed: int) -> dict[str, float]:
        with tempfile.TemporaryDirectory() as scratch:
            run, merged = Path(scratch, "run"), Path(scratch, "merged")
            options = _options(method, rate, seed, 120, run)
            options["training"] |= {"per_device_train_batch_size": 16}
            options["training"] |= {"eval_strategy": "steps", "eval_steps": 120}
            data = task["data"] | {"seed": seed}
            train(RunConfig(task="classifier", model=task["model"], data=data, **options))
            merge(None, run, merged, verify=False)
            model = AutoModelForSequenceClassification.from_pretrained(merged).eval()
            held_out = HeldOut(run)
            found = {"loss as trained": held_out.loss(model)}
            for name, layer in model.named_modules():
                if isinstance(layer, torch.nn.Linear) and ".encoder." in name:
                    values = layer.weight.detach().numpy()
                    again = gguf.quants.dequantize(gguf.quants.quantize(values, q4), q4)
                    layer.weight.data = torch.from_numpy(again)
            return found | {"loss in the file": held_out.loss(model)}

    for method in ("paca", "lora"):
        first = {rate: losses(method, rate, args.seeds[0]) for rate in _RATES_AFTER}
        best = min(first, key=lambda rate: first[rate]["loss in the file"])
        runs = [first[best], *(losses(method, best, seed) for seed in args.seeds[1:])]
        for what in first[best]:
            each = {str(seed): run[what] for seed, run in zip(args.seeds, runs, strict=True)}
            yield mean_row(what, method, each, f"{method}: learning rate {best:g}.", **names)


def main(options: list[str] | None = None) -> None:
    """Measure, write the result, print it."""
    parser = new_parser(__doc__, is_timed=True)
    add = parser.add_argument
    add("--quick", action="store_true", help="one format, task and seed; fewer steps and rows")
    add("--seeds", nargs="+", type=int, default=[0, 1, 2])
    add("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    add("--formats", nargs="+", choices=FORMATS, default=list(FORMATS))
    add("--forms", nargs="+", choices=list(FORMS), default=list(FORMS))
    add("--steps", type=at_least_1, default=40)
    add("--rows", type=at_least_1, default=100, help="held-out rows that are scored")
    add("--work", type=Path, default=default_cache() / "packed", help="where cells are kept")
    args = parser.parse_args(options)
    if args.quick:
        args.tasks, args.formats, args.seeds = list(TASKS)[:1], list(FORMATS[:1]), [0]
        args.steps, args.rows, args.forms = 10, 20, ["paca", "lora"]
    how = (
        f"{args.steps} steps of 8 rows, bfloat16, all linear layers; scores of {args.rows} "
        f"held-out rows, seeds {', '.join(map(str, args.seeds))}"
    )
    titles = {name: form.title for name, form in FORMS.items()}
    name = "packed-part" if args.quick else "packed"
    record(name, how, lambda: measure(args), args, options, titles)


if __name__ == "__main__":
    sys.exit(main())
