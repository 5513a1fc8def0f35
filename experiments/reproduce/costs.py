"""What a step costs: Table 4, Figures 2 and 3, and the memory and time of Tables 1 to 3.

At the paper's own sizes memory, lengths and batches are simulated and operations are counted, as
the authors' repository (commit be9a806) computes: weights and adapters in 16 bits, all logits, no
gradient checkpointing. Times are measured of a small Llama.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.methods import make_contender
from benchmarks.models import llama_values, make_batch
from benchmarks.timing import Step, alternate, ratio_row, time_row
from experiments.paper import METHOD_TITLES, PAPER, Line, Printed
from experiments.reproduce.experiment import Experiment
from pacatune.measure.counters import SavedBytes
from pacatune.measure.device import gpu_bytes
from pacatune.measure.setting import Setting
from pacatune.methods import METHODS
from pacatune.precision import bfloat16_is_fast
from pacatune.reports.provenance import num_cores
from pacatune.reports.rows import Job, Row

MODEL = "llama3-8b"
"""The model of the paper whose lines numbers of a small one stand beside."""
RANK = 8
"""Rank of all that is measured: the paper's 8, and its 64 of 4,096 channels in proportion."""
GB = 10**9
GPU = "a100-80g"
# Hidden size and layers of the Llama whose steps are timed, and for how long.
_SHAPE, _SECONDS = (512, 8), 30.0
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
    from pacatune.measure.estimate import estimate_memory

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
    return [
        Row(
            what="memory",
            method=line.title,
            value=value,
            low=min(low, value),
            high=high,
            unit="GB",
            model=line.model,
            origin="simulated",
            note=note,
        )
    ]


def _tokens_for(setting: Setting, num_bytes: float) -> int:
    """Return the tokens of a micro-batch that take so much, by the line through two lengths."""
    from pacatune.measure.estimate import estimate_memory

    short, long = (
        estimate_memory(setting.but(batch_size=1, seq_len=length)).peak_bytes for length in _LENGTHS
    )
    per_token = (long - short) / (_LENGTHS[1] - _LENGTHS[0])
    return round(_LENGTHS[0] + (num_bytes - short) / per_token)


def bench_job(
    methods: Sequence[str], tokens: int, seq_len: int, read: Callable[[list[Row]], list[Row]]
) -> Job:
    """Return a job that measures steps of a small Llama; `read` names rows as the paper does."""
    title = f"Llama {_SHAPE[0]}x{_SHAPE[1]}"
    sizes = {"methods": list(methods), "tokens": tokens, "seq_len": seq_len, "rank": RANK}

    def run(work: Path) -> list[Row]:
        groups = [[m for m in methods if m.startswith("q") == is_4bit] for is_4bit in (False, True)]
        rows = [_measure(group, tokens, seq_len, title) for group in groups if group]
        return read([row for group in rows for row in group])

    return Job(key="bench", title=f"measuring {title}", inputs={"model": title, **sizes}, run=run)


def _measure(methods: Sequence[str], tokens: int, seq_len: int, title: str) -> list[Row]:
    """Let methods on equal bases take turns, in the number format that is fast here."""
    dtype = torch.bfloat16 if bfloat16_is_fast(use_cpu=True) else torch.float32
    torch.set_num_threads(num_cores())
    values, rows = llama_values(*_SHAPE), list[Row]()
    batch = make_batch(max(1, tokens // seq_len), min(tokens, seq_len), values["vocab_size"], 0)
    options = {"rank": RANK, "alpha": RANK, "adapter_dtype": dtype}
    steps = {
        method: Step(contender=make_contender(method, values, dtype, **options), batch=batch)
        for method in methods
    }
    for method, step in steps.items():
        with SavedBytes(step.contender.model) as saved:
            loss = step.forward()
        del loss
        size: dict[str, Any] = {"value": saved.num_bytes, "unit": "bytes", "origin": "counted"}
        rows.append(Row(what="kept for backward", method=method, model=title, **size))
    rounds = alternate(dict(steps), seconds=_SECONDS, min_rounds=5, num_warmup=2)
    times = {method: [sum(phases) for phases in each] for method, each in rounds.items()}
    series = {"step": times}
    for place, phase in enumerate(_PHASES):
        series[phase] = {
            method: [phases[place] for phases in each] for method, each in rounds.items()
        }
    ours = next((method for method in methods if METHODS[method].is_paca), methods[0])
    for what, seconds in series.items():
        names: dict[str, Any] = {"what": what, "model": title}
        rows += [time_row(each, method=method, **names) for method, each in seconds.items()]
        for other in (method for method in methods if method != ours):
            both = seconds[ours], seconds[other]
            rows.append(ratio_row(*both, seed=0, method=f"{ours} / {other}", **names))
    return rows


def step_jobs(table: Printed, *, tokens: int, seq_len: int) -> list[Job]:
    """Return the job that measures steps of a small Llama beside Table 1, 2 or 3."""
    lines: dict[str, Line] = {}
    for line in table.trained:
        if line.model == MODEL:
            lines.setdefault(line.method, line)  # that of the smallest rank
    titles = {method: line.title for method, line in lines.items()}

    def read(rows: list[Row]) -> list[Row]:
        titled = {"step": "training time", "kept for backward": "memory"}
        return [
            replace(_named(row, titles), what=titled[row.what], setting=_how(row.what))
            for row in rows
            if row.what in titled and (row.unit == "ratio" or row.what != "step")
        ]

    return [bench_job(list(titles), tokens, seq_len, read)]


def _how(what: str) -> str:
    return {"step": "a step"}.get(what, what) + f", rank {RANK}"


def _named(row: Row, titles: dict[str, str]) -> Row:
    """Return a row of `bench` under the names that the paper has for its methods."""
    names = [titles[part] for part in row.method.split(" / ")]
    return replace(row, method=" / ".join(names))


# Table 4: the longest sequence that one A100 trains.

_OTHERWISE = {"dropout": {"dropout": 0.1}, "lean activations": {"lean": "auto", "loss": "auto"}}


def _jobs_4() -> list[Job]:
    jobs = []
    for line in PAPER["table4"].lines:
        setting = setting_of(line)
        variants = {"": setting}
        for name, options in _OTHERWISE.items():
            if (line.method == "paca") == (name != "dropout") or line.method == "lora":
                variants[name] = setting.but(**options)
        for name, variant in variants.items():
            jobs.append(
                Job(
                    key="-".join(filter(None, ("length", line.key, name.partition(" ")[0]))),
                    title=f"simulating the longest sequence of {line.title}, {name or 'as stated'}",
                    inputs={**asdict(variant), "gpu": GPU},
                    run=partial(_simulate_length, line, variant, name),
                )
            )
    return jobs


def _simulate_length(line: Line, setting: Setting, how: str, work: Path) -> list[Row]:
    from pacatune.measure.estimate import find_max

    longest, _ = find_max(setting, "seq_len", gpu_bytes(GPU))
    return [
        Row(
            what="longest sequence",
            method=line.title,
            value=longest,
            unit="tokens",
            model=line.model,
            setting=how,
            origin="simulated",
        )
    ]


TABLE_4_EXPERIMENT = Experiment(
    paper=PAPER["table4"],
    about="How long may one text be before the memory of an NVIDIA A100 (80 GB) is full? Memory "
    "grows with every token, by what a method keeps for the backward pass: LoRA the whole input of "
    "every adapted layer, PaCA the few channels that it trains. The longest text that surely fits "
    "is found by bisection of simulated steps, with the largest CUDA context and the largest gaps "
    "between blocks that `pacatune estimate` allows for.",
    beside=MODEL,
    jobs=_jobs_4,
    notes=(
        "The paper leaves open whether LoRA and its relatives had dropout here. Without it every "
        "method comes near the paper's length; with dropout 0.1 they would not.",
        "The paper used transformers 4.43, which kept repeated heads of keys and values; the "
        "version here does not, so that every method reaches some per cent more.",
    ),
)

# Figure 2: operations and time of a step.

_TOKENS, _ROWS = 512, 2
_PHASES = ("forward", "backward")
_NAMES = {
    "step": "of a step",
    "forward": "of the forward pass",
    "backward": "of the backward pass",
    "backward / forward": "of the backward pass, as a share of the forward pass's",
}
_METHODS_2, _METHODS_3 = ("full", "lora", "paca"), ("lora", "dora", "moslora", "paca")


def _jobs_fig2() -> list[Job]:
    tokens = [_ROWS, _TOKENS]
    count = Job(
        key="operations",
        title=f"counting the operations of a step of {MODEL}",
        inputs={"model": MODEL, "methods": list(_METHODS_2), "rank": RANK, "tokens": tokens},
        run=_count_operations,
    )

    def read(rows: list[Row]) -> list[Row]:
        phases = {"step", *_PHASES}
        shown = [_named(row, METHOD_TITLES) for row in rows if row.what in phases]
        return _phase_shares("time", [replace(row, setting="") for row in shown])

    return [count, bench_job(_METHODS_2, _ROWS * _TOKENS, _TOKENS, read)]


def _count_operations(work: Path) -> list[Row]:
    from pacatune.measure.simulate import FakeTraining

    rows = []
    for method in _METHODS_2:
        setting = make_setting(method, rank=RANK, batch_size=_ROWS, seq_len=_TOKENS)
        counts = FakeTraining(setting).count_operations(_ROWS, _TOKENS)
        numbers = {phase: counts[phase] / 1e12 for phase in _PHASES}
        for phase, value in {**numbers, "step": sum(numbers.values())}.items():
            row = Row(
                what=phase,
                method=METHOD_TITLES[method],
                value=value,
                unit="TFLOP",
                model=MODEL,
                origin="counted",
            )
            rows.append(row)
    return _phase_shares("operations", rows)


def _phase_shares(quantity: str, rows: list[Row]) -> list[Row]:
    """Return rows of phases under the paper's names, with every share that its text states."""
    kept = [replace(row, what=f"{quantity} {_NAMES[row.what]}") for row in rows]
    numbers = {(row.what, row.method): row for row in rows}
    have = {(row.what, row.method) for row in kept}
    for claim in PAPER["fig2"].claims:
        if not claim.what.startswith(quantity) or (claim.what, claim.method) in have:
            continue
        if " / " in claim.method:
            phase = next(p for p, of in _NAMES.items() if claim.what == f"{quantity} {of}")
            pair = [numbers.get((phase, method)) for method in claim.method.split(" / ")]
        else:
            pair = [numbers.get((phase, claim.method)) for phase in ("backward", "forward")]
        if pair[0] is not None and pair[1] is not None:
            share = replace(pair[0].over(pair[1]), what=claim.what, method=claim.method)
            # Times that did not take turns have quartiles, which say nothing of their share.
            kept.append(share if share.is_exact else replace(share, low=None, high=None))
    return kept


FIGURE_2_EXPERIMENT = Experiment(
    paper=PAPER["fig2"],
    about="The paper counts the operations of the forward and the backward pass, and measures "
    "their times. LoRA computes a third less than full fine-tuning and yet takes as long, since "
    "its small matrices are steps of their own in every layer; PaCA has no such steps. Operations "
    "are counted here at the paper's own size, 2 x 512 tokens of LLaMA3-8B, which is exact.",
    beside=MODEL,
    jobs=_jobs_fig2,
)

# Figure 3: throughput over the batch.


def _jobs_fig3() -> list[Job]:
    jobs = []
    for method in _METHODS_3:
        setting = make_setting(method, rank=RANK, seq_len=_TOKENS)
        jobs.append(
            Job(
                key=f"batch-{method}",
                title=f"simulating the largest batch of {METHOD_TITLES[method]} on {MODEL}",
                inputs={**asdict(setting), "gpu": GPU},
                run=partial(_simulate_batch, method, setting),
            )
        )
    return jobs


def _simulate_batch(method: str, setting: Setting, work: Path) -> list[Row]:
    from pacatune.measure.estimate import find_max

    largest, _ = find_max(setting, "batch_size", gpu_bytes(GPU))
    return [
        Row(
            what="largest batch of 512 tokens",
            method=METHOD_TITLES[method],
            value=largest,
            model=MODEL,
            origin="simulated",
        )
    ]


FIGURE_3_EXPERIMENT = Experiment(
    paper=PAPER["fig3"],
    about="A GPU works best on many texts at once, and memory decides how many. The paper raises "
    "the batch until memory ends, on an NVIDIA A100 and an Intel Gaudi2, and counts sentences of "
    "512 tokens per second. The largest batch on an A100 (80 GB) is simulated here; throughput was "
    "measured once, of a small Llama (commit 9606675fd).",
    beside=MODEL,
    jobs=_jobs_fig3,
)
