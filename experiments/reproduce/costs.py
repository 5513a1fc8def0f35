"""What a step costs: Table 4, Figures 2 and 3, and the memory and time of Tables 1 to 3.

At the paper's own sizes memory, lengths and batches are simulated and operations are counted, as
the authors' repository (commit be9a806) computes: weights and adapters in 16 bits, all logits, no
gradient checkpointing. Times are measured of a small Llama.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from functools import partial
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch

from benchmarks.methods import make_contender
from benchmarks.models import llama_values, make_batch
from benchmarks.results import compare, counted
from benchmarks.timing import Step, alternate
from experiments.jobs import Job
from experiments.paper import METHOD_TITLES, MODEL, PAPER, Line, Printed
from pacatune.measure.device import gpu_bytes
from pacatune.measure.estimate import Quantity, estimate_memory, find_max
from pacatune.measure.setting import Setting
from pacatune.measure.simulate import FakeTraining
from pacatune.methods import METHODS
from pacatune.precision import bfloat16_is_fast
from pacatune.reports.provenance import num_cores
from pacatune.reports.rows import Row

RANK = 8
"""Rank of all that is measured: the paper's 8, and its 64 of 4,096 channels in proportion."""
GB = 10**9
GPU = "a100-80g"
# Hidden size and layers of the Llama whose steps are timed, and for how long steps are.
_SHAPE, _SECONDS = (512, 8), 30.0
KEPT = "kept for backward"
# Two lengths between which a line is drawn.
_LENGTHS = (256, 512)


def make_setting(method: str, model: str = MODEL, **sizes: Any) -> Setting:
    """Return a setting as the authors' code computes."""
    usual: dict[str, Any] = {"adapter_dtype": "bfloat16", "lean": "off", "loss": "logits"}
    return Setting(model=model, method=method, **usual, **sizes)


def setting_of(line: Line) -> Setting:
    """Return what is simulated for a line that is trained of Table 1, 2, 3 or 4."""
    stated = line.settings
    micro_batches = stated.get("micro_batches", 1)
    return make_setting(
        line.method,
        line.model,
        rank=line.rank,
        dropout=stated.get("dropout", 0.0),
        batch_size=stated["batch_size"] // micro_batches,
        gradient_accumulation=micro_batches,
        seq_len=stated.get("seq_len", 512),
    )


def memory_jobs(table: Printed, *, explain: bool = False) -> list[Job]:
    """Return the jobs that simulate the memory of Table 1, 2 or 3 at the paper's sizes.

    With `explain` they also say how many tokens would take the paper's memory, where it names the
    longest text only and not the usual one.
    """
    return [
        Job(
            key=f"memory-{line.key}",
            title=f"simulating {line.title} on {line.model}",
            inputs={**asdict(setting_of(line)), "explain": explain},
            run=partial(_simulate_memory, line, explain),
        )
        for line in table.trained
    ]


def _simulate_memory(line: Line, explain: bool, work: Path) -> list[Row]:
    setting = setting_of(line)
    found, note = estimate_memory(setting), ""
    if explain:
        number = _tokens_for(setting, line.values["memory"] * GB)
        most = setting.batch_size * setting.seq_len
        note = (
            f"{line.title} on {line.model}: {number:,} tokens per micro-batch would take the "
            f"paper's memory; its settings allow {most:,} at the most."
        )
    low, value, high = (n / GB for n in (found.low_bytes, found.peak_bytes, found.high_bytes))
    names: dict[str, Any] = {"what": "memory", "method": line.title, "model": line.model}
    ends = {"low": min(low, value), "high": high}
    return [Row(value=value, unit="GB", origin="simulated", note=note, **names, **ends)]


def _tokens_for(setting: Setting, num_bytes: float) -> int:
    """Return the tokens of a micro-batch that take so much, by the line through two lengths."""
    short, long = (
        estimate_memory(setting.but(batch_size=1, seq_len=length)).peak_bytes for length in _LENGTHS
    )
    per_token = (long - short) / (_LENGTHS[1] - _LENGTHS[0])
    return round(_LENGTHS[0] + (num_bytes - short) / per_token)


def _largest_job(key: str, simulated: Setting, quantity: Quantity, **names: Any) -> Job:
    """Return the job that finds the largest length or batch that surely fits on the GPU."""

    def run(work: Path) -> list[Row]:
        largest, _ = find_max(simulated, quantity, gpu_bytes(GPU))
        return [Row(value=largest, model=MODEL, origin="simulated", **names)]

    how = ", ".join(filter(None, (names["method"], names.get("setting"))))
    title, inputs = f"simulating the {names['what']}: {how}", {**asdict(simulated), "gpu": GPU}
    return Job(key=key, title=title, inputs=inputs, run=run)


def measured(steps: Mapping[str, Step], model: str) -> list[Row]:
    """Count what contenders keep for backward, and time whole steps and their passes in turns.

    Shares are of the first one.
    """
    rows = [counted(KEPT, m, step.kept_bytes(), "bytes", model=model) for m, step in steps.items()]
    rounds = alternate(dict(steps), seconds=_SECONDS, min_rounds=5, num_warmup=2)
    first, *others = steps
    pairs = [(first, other) for other in others]
    parts = {"step": sum, "forward": itemgetter(0), "backward": itemgetter(1)}
    for what, part in parts.items():
        times = {method: [part(phases) for phases in each] for method, each in rounds.items()}
        rows += compare(times, 0, pairs, what=what, model=model)
    return rows


def as_costs(rows: list[Row], titles: Mapping[str, str], how: str) -> list[Row]:
    """Return kept bytes, and shares of whole steps, under the names of the paper's tables."""
    costs = {KEPT: ("memory", KEPT), "step": ("training time", "a step")}
    named = []
    for row in rows:
        if row.what == KEPT or (row.what == "step" and row.unit == "ratio"):
            what, title = costs[row.what]
            named.append(replace(titled(row, titles), what=what, setting=f"{title}, {how}"))
    return named


def titled(row: Row, titles: Mapping[str, str]) -> Row:
    """Return a row under the names that the paper has for its methods."""
    return replace(row, method=" / ".join(titles[part] for part in row.method.split(" / ")))


def bench_job(
    titles: Mapping[str, str], tokens: int, seq_len: int, read: Callable[[list[Row]], list[Row]]
) -> Job:
    """Return a job that measures steps of a small Llama by some methods, ours first."""
    model = f"Llama {_SHAPE[0]}x{_SHAPE[1]}"
    methods = sorted(titles, key=lambda method: not METHODS[method].is_paca)
    sizes = {"methods": methods, "tokens": tokens, "seq_len": seq_len, "rank": RANK}

    def run(work: Path) -> list[Row]:
        torch.set_num_threads(num_cores())
        dtype = torch.bfloat16 if bfloat16_is_fast(use_cpu=True) else torch.float32
        values = llama_values(*_SHAPE)
        batch = make_batch(tokens // seq_len, seq_len, values["vocab_size"], 0)
        options = {"rank": RANK, "alpha": RANK, "adapter_dtype": dtype}
        contenders = [make_contender(name, values, dtype, **options) for name in methods]
        steps = {each.method: Step(contender=each, batch=batch) for each in contenders}
        return read(measured(steps, model))

    return Job(key="bench", title=f"measuring {model}", inputs={"model": model, **sizes}, run=run)


def step_job(table: Printed, *, tokens: int, seq_len: int) -> Job:
    """Return the job that measures steps of a small Llama beside Table 1, 2 or 3."""
    titles = dict[str, str]()
    for line in table.trained:
        if line.model == MODEL:
            titles.setdefault(line.method, line.title)  # that of the smallest rank
    how = f"rank {RANK}"
    return bench_job(titles, tokens, seq_len, lambda rows: as_costs(rows, titles, how))


# Table 4: the longest sequence that one A100 trains.

_OTHERWISE = {"dropout": {"dropout": 0.1}, "lean activations": {"lean": "auto", "loss": "auto"}}


def table_4_jobs() -> list[Job]:
    """Return the jobs of Table 4, as stated and otherwise."""
    jobs = []
    for line in PAPER["table4"].lines:
        setting = setting_of(line)
        variants = {"": setting}
        for name, options in _OTHERWISE.items():
            if (line.method == "paca") == (name != "dropout") or line.method == "lora":
                variants[name] = setting.but(**options)
        for name, variant in variants.items():
            key = "-".join(filter(None, ("length", line.key, name.partition(" ")[0])))
            names = {"what": "longest sequence", "method": line.title, "setting": name}
            jobs.append(_largest_job(key, variant, "seq_len", unit="tokens", **names))
    return jobs


# Figure 2: operations and time of a step.

_TOKENS, _ROWS = 512, 2
_TITLES_2 = {method: METHOD_TITLES[method] for method in ("full", "lora", "paca")}
_PHASES = {
    "forward": "of the forward pass",
    "backward": "of the backward pass",
    "step": "of a step",
}


def figure_2_jobs() -> list[Job]:
    """Return the jobs of Figure 2: operations at the paper's size, times of a small Llama."""
    inputs = {"model": MODEL, "methods": [*_TITLES_2], "rank": RANK, "tokens": [_ROWS, _TOKENS]}
    title = f"counting the operations of a step of {MODEL}"
    count = Job(key="operations", title=title, inputs=inputs, run=_count_operations)

    def read(rows: list[Row]) -> list[Row]:
        times = [titled(row, _TITLES_2) for row in rows if row.what in _PHASES]
        return with_stated_shares("time", times)

    return [count, bench_job(_TITLES_2, _ROWS * _TOKENS, _TOKENS, read)]


def _count_operations(work: Path) -> list[Row]:
    rows, names = [], {"unit": "TFLOP", "model": MODEL, "origin": "counted"}
    for method, title in _TITLES_2.items():
        setting = make_setting(method, rank=RANK, batch_size=_ROWS, seq_len=_TOKENS)
        counts = FakeTraining(setting).count_operations(_ROWS, _TOKENS)
        numbers = {phase: counts[phase] / 1e12 for phase in ("forward", "backward")}
        numbers["step"] = sum(numbers.values())
        rows += [Row(what=phase, method=title, value=n, **names) for phase, n in numbers.items()]
    return with_stated_shares("operations", rows)


def with_stated_shares(quantity: str, rows: list[Row]) -> list[Row]:
    """Return rows of phases under the paper's names, with every share that its text states."""
    rows = [replace(row, what=f"{quantity} {_PHASES[row.what]}") for row in rows]
    numbers = {(row.what, row.method): row for row in rows}
    for claim in PAPER["fig2"].claims:
        what, _, is_of_forward = claim.what.partition(", as a share")
        pair = [(what, method) for method in claim.method.split(" / ")]
        if is_of_forward:
            pair.append((what.replace("backward", "forward"), claim.method))
        if (claim.what, claim.method) not in numbers and numbers.keys() >= {*pair}:
            share = numbers[pair[0]].over(numbers[pair[1]])
            share = replace(share, what=claim.what, method=claim.method)
            # Times that did not take turns have quartiles, which say nothing of their share.
            rows.append(share if share.is_exact else replace(share, low=None, high=None))
    return rows


# Figure 3: throughput over the batch.


def figure_3_jobs() -> list[Job]:
    """Return the jobs of Figure 3: the largest batches."""
    jobs = []
    for method in ("lora", "dora", "moslora", "paca"):
        setting = make_setting(method, rank=RANK, seq_len=_TOKENS)
        names = {"what": f"largest batch of {_TOKENS} tokens", "method": METHOD_TITLES[method]}
        jobs.append(_largest_job(f"batch-{method}", setting, "batch_size", **names))
    return jobs
