"""Tables 2, 3 and 5: instruction tuning on Oasst1, scored by MT-Bench.

At the small scale SmolLM2-135M is trained on questions and answers. A judge of answers is not to be
had offline, so what is compared there is the loss on held-out answers.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from pacatune.experiments.reproduce.comparison import fill_section
from pacatune.experiments.reproduce.experiment import Cell, Experiment, Mode, Results
from pacatune.experiments.reproduce.runs import (
    GUANACO,
    SEED,
    UNTRAINED,
    Runs,
    cost_columns,
    cost_numbers,
    costs,
    evaluate_line,
    hub_id,
    text_run,
    train_line,
)
from pacatune.experiments.reproduce.scores import SPREAD_NOTE, one_arm, scores_of, study_cell
from pacatune.experiments.reproduce.section import Measured, Section
from pacatune.experiments.reproduce.settings import SettingsBeside, of_run
from pacatune.experiments.reproduce.simulation import memory_cells, memory_column, simulated_memory
from pacatune.experiments.reproduce.steps import (
    MODEL,
    RANK,
    bench_cell,
    bench_columns,
    bench_config,
    bench_numbers,
    small_dtype,
)
from pacatune.experiments.reproduce.verdicts import Column
from pacatune.experiments.study import Arm, StudyConfig
from pacatune.experiments.study.tuning import is_at_edge, tune
from pacatune.paper.settings import Settings, table_10, table_11
from pacatune.paper.tables import (
    SCORES,
    TABLE_2,
    TABLE_3,
    TABLE_5,
    Quantity,
    Row,
    Table,
)

__all__ = [
    "TABLE_2_EXPERIMENT",
    "TABLE_3_EXPERIMENT",
    "TABLE_5_EXPERIMENT",
    "InstructionTable",
    "judge_options",
    "small_cell",
    "small_study",
]


@dataclass(frozen=True, kw_only=True)
class InstructionTable:
    """What the three tables differ in."""

    table: Table
    about: tuple[str, ...]
    notes: tuple[str, ...] = ()
    stated: Callable[[Row], Settings]
    """Settings of a line."""
    title: Callable[[Row], str]
    """Title of a line's settings."""
    has_costs: bool = True
    """Whether the paper has its memory and time."""

    @property
    def trained(self) -> list[Row]:
        """The lines that are fine-tuned."""
        return [row for row in self.table.rows if row.method not in UNTRAINED]

    @property
    def small(self) -> list[Row]:
        """The lines that the small scale stands beside."""
        return [row for row in self.trained if row.model == MODEL]


def _experiment(spec: InstructionTable) -> Experiment:
    return Experiment(
        name=spec.table.name,
        title=spec.table.title,
        place=spec.table.place,
        methods=tuple(spec.table.methods()),
        cells=partial(_cells, spec),
        section=partial(_section, spec),
        settings=partial(_settings, spec),
        cannot={}
        if spec.has_costs
        else {"simulate": "it has no memory column; there is nothing to simulate."},
    )


def _cells(spec: InstructionTable, mode: Mode) -> list[Cell]:
    if mode == "full":
        return [_full_cell(spec, row) for row in spec.table.rows]
    found = memory_cells(spec.table, explain=True) if spec.has_costs else []
    if mode == "small" and spec.has_costs:
        methods = spec.table.trained_methods
        config = bench_config("small", methods, tokens=(768,), seq_len=768, rank=RANK)
        found.append(bench_cell(config, methods))
    if mode == "small":
        found += [small_cell(row) for row in spec.small]
    return found


def _section(spec: InstructionTable, mode: Mode, results: Results) -> Section:
    table = spec.table
    part = Section(
        name=table.name,
        title=table.title,
        place=table.place,
        about=list(spec.about),
        notes=list(spec.notes),
    )
    if mode == "full":
        columns = [*(cost_columns(table) if spec.has_costs else ()), *_score_columns()]
        fill_section(part, table, columns, _full_numbers(spec, results))
        return part
    columns, ours = [], dict[tuple[str, str], Measured]()
    if spec.has_costs:
        columns.append(memory_column(table))
        ours |= simulated_memory(table, results)
    bench = results.get("bench")
    if bench is not None:
        ours |= bench_numbers(table, bench, {name: name for name in table.trained_methods})
        columns += bench_columns(table, bench)
    lines = {row.key: f"{_PREFIX}{row.key}" for row in spec.small}
    ours |= {(line, _KEY): score for line, score in scores_of(lines, results).items()}
    fill_section(part, table, [*columns, _small_column(table)], ours)
    return part


def _settings(spec: InstructionTable, scale: Literal["small", "full"]) -> list[SettingsBeside]:
    """Return ours beside the paper's."""
    if scale == "small":
        return [_small_settings(row, spec.stated(row)) for row in spec.small]
    return [
        SettingsBeside(
            title=spec.title(row),
            paper=spec.stated(row),
            ours=of_run(_full_run(spec.stated(row), row, 1e-3), "Oasst1", grid=spec.stated(row)),
            why={"model": "its name on the hub"},
            commands=_full_commands(spec.stated(row), row),
        )
        for row in spec.trained
    ]


# Full scale: train at each rate, score the best by MT-Bench.


_JUDGE = {
    "judge_url": "https://api.openai.com/v1",
    "judge_model": "gpt-4o-mini",
    "judge_key_env": "OPENAI_API_KEY",
}


def judge_options(row: Row) -> dict[str, str]:
    """Return the options of MT-Bench, by their names in MtBenchConfig."""
    held = {"quantization": "nf4"} if row.method in ("quantized", "qlora") else {}
    return held | _JUDGE


def _full_run(stated: Settings, row: Row, rate: float) -> Any:
    kind, _, number = row.variant.partition("-")
    return text_run(
        stated,
        row.method,
        model=hub_id(row.model),
        data=GUANACO,
        rate=rate,
        seed=SEED + (int(number) - 1 if number else 0),
        selection=kind or "random",
    )


def _full_commands(stated: Settings, row: Row) -> tuple[str, ...]:
    """Return what runs for a line, as it is typed."""
    is_trained = row.method not in UNTRAINED
    words = [
        word
        for name, value in judge_options(row).items()
        for word in (f"--{name.replace('_', '-')}", value)
    ]
    judge = evaluate_line("mt-bench", hub_id(row.model), *words, has_adapter=is_trained)
    if not is_trained:
        return (judge,)
    run = _full_run(stated, row, (stated.learning_rates or (1e-3,))[0])
    return (train_line(run), judge)


def _full_cell(spec: InstructionTable, row: Row) -> Cell:
    stated = spec.stated(row)
    return Cell(
        key=f"full-{row.key}",
        title=f"{row.title} on {row.model}: training on Oasst1, then MT-Bench",
        methods=(row.method,),
        inputs={
            "row": row.key,
            "rates": list(stated.learning_rates or ()),
            "commands": list(_full_commands(stated, row)),
        },
        run=partial(_run_full, row, stated),
    )


def _run_full(
    row: Row, stated: Settings, folder: Path, tell: Callable[[str], None]
) -> dict[str, Any]:
    runs = Runs(folder=folder, tell=tell)
    if row.method in UNTRAINED:
        return {"scores": _judged(runs, row, None)}

    def train(rate: float, seed: int) -> tuple[dict[str, Any], Path]:
        return runs.train(_full_run(stated, row, rate), f"rate-{rate:g}")

    rates = stated.learning_rates or ()
    tuned = tune(rates, (SEED,), train, lambda run: float(run[0]["eval_loss_after"]))
    report, adapter = tuned.runs[SEED]
    return {
        "scores": _judged(runs, row, adapter),
        "learning_rate": tuned.rate,
        "rates": {str(rate): loss for rate, loss in tuned.curve.items()},
        **costs(report),
    }


def _judged(runs: Runs, row: Row, adapter: Path | None) -> dict[str, Any]:
    """Return the mean of each category, and of all as the paper's average, with its interval.

    MT-Bench goes on by itself with the answers and judgments that its folder holds.
    """
    from pacatune.evaluation.mt_bench import MtBenchConfig, run_mt_bench

    options: dict[str, Any] = dict(judge_options(row))
    config = MtBenchConfig(
        output=runs.folder / "mt-bench",
        model=hub_id(row.model),
        adapter=None if adapter is None else str(adapter),
        **options,
    )
    runs.tell(f"  MT-Bench of {row.title} on {row.model}")
    with runs.quiet("mt-bench") as console:
        result = run_mt_bench(config, console, console)
    found = {}
    for line in result["table"]:
        mean, low, high = line["mean"], line["low"], line["high"]
        if mean is not None:
            name = "average" if line["name"] == "all" else line["name"]
            ends = (mean, mean) if low is None else (low, high)
            found[name] = {"value": mean, "low": ends[0], "high": ends[1]}
    return found


def _score_columns() -> list[Column]:
    return [
        Column(
            quantity=Quantity(
                key=f"full_{paper.key}",
                title=f"MT-Bench, {paper.title}",
                unit=paper.unit,
                kind="score",
                margin=paper.margin,
            ),
            paper=paper,
            is_same=True,
            about="By `pacatune evaluate mt-bench` with GPT-4o-mini as the judge; 95 % intervals.",
        )
        for paper in SCORES
    ]


def _full_numbers(spec: InstructionTable, results: Results) -> dict[tuple[str, str], Measured]:
    found: dict[tuple[str, str], Measured] = {}
    for row in spec.table.rows:
        result = results.get(f"full-{row.key}")
        if result is None:
            continue
        rate, rates = result.get("learning_rate"), [float(r) for r in result.get("rates", {})]
        for name, score in result["scores"].items():
            found[row.key, f"full_{name}"] = Measured(
                origin="measured", rate=rate, at_edge=is_at_edge(rate, rates), **score
            )
        if "peak_memory_bytes" in result and "memory" in row.values:
            found |= cost_numbers(spec.table, row, result)
    return found


# Small scale: a study of one arm for each line.


_KEY, _PREFIX = "small_loss", "small-"
_TASK, _SMALL_MODEL = "smollm2-chat", "SmolLM2-135M-Instruct"
_STEPS = 12
# Columns of the largest gradients need smaller ones than others.
_RATES = [5e-4, 1.5e-3, 4e-3]
_SELECTION_BATCHES = 8
# Of some 560 questions; what rates are chosen by.
_VALIDATION = 0.05


def _selection(row: Row) -> tuple[str, tuple[int, ...]]:
    """Return the strategy of a line, and the seeds of its runs: other ones for other columns."""
    kind, _, number = row.variant.partition("-")
    return kind or "random", ((2, 3) if number == "2" else (0, 1))


def small_study(row: Row) -> StudyConfig:
    """Return the study of one line; the first seed chooses the rate."""
    selection, seeds = _selection(row)
    options: dict[str, Any] = {
        "model": {"dtype": small_dtype()},
        "training": {"max_steps": _STEPS, "lr_scheduler_type": "linear", "warmup_steps": 0.1},
    }
    if row.method.endswith("paca"):
        options["paca"] = {"selection_batches": _SELECTION_BATCHES}
    # alpha = rank: the update is not scaled, and the grid of rates is the same for every rank.
    arm = Arm(method=row.method, rank=row.rank, selection=selection, learning_rates=list(_RATES))
    return one_arm(
        _TASK,
        row.method,
        arm,
        options=options,
        seeds=list(seeds),
        validation_fraction=_VALIDATION,
    )


def small_cell(row: Row) -> Cell:
    """Return the cell of one line."""
    selection, _ = _selection(row)
    how = "" if selection == "random" else f", columns by {selection}"
    return study_cell(
        small_study(row),
        f"{_PREFIX}{row.key}",
        f"{_SMALL_MODEL} by {row.method}, rank {row.rank}{how}",
        row.method,
    )


def _small_column(table: Table) -> Column:
    """Return the column of the held-out loss, beside the average of MT-Bench."""
    return Column(
        quantity=Quantity(
            key=_KEY,
            title="loss on held-out answers, small model",
            unit="nats per token",
            kind="score",
            margin=0.02,
        ),
        paper=table.quantity("average"),
        is_same=False,
        is_inverted=True,
        model=_SMALL_MODEL,
        about=f"{_SMALL_MODEL}, {_STEPS} steps of 8 questions and answers; for every method the "
        f"best of the learning rates {', '.join(f'{rate:g}' for rate in _RATES)} on validation "
        f"data. Less is better. {SPREAD_NOTE}",
    )


def _small_settings(row: Row, paper: Settings) -> SettingsBeside:
    from pacatune.experiments.study.plan import arm_options
    from pacatune.experiments.study.task import merged
    from pacatune.experiments.study.tasks import TextTask

    study = small_study(row)
    (arm,) = study.arms.values()
    base = {
        "model": {"path": _SMALL_MODEL},
        "data": {"path": "chatterbot-corpus", "eval_path": "heldout"},
        "training": {"per_device_train_batch_size": 8},
    }
    task = TextTask(merged(base, study.options), study.validation_fraction, 0)
    rate = {"training": {"learning_rate": _RATES[0]}}
    run = task.make_config(arm_options(arm, arm.rank), rate)
    why = {
        "model": "the largest real one that comes as a Python package",
        "data": "comes as a Python package; there is no judge offline, so its held-out loss counts",
        "alpha": "the rank, so that every rank has the same scale; its place is taken by the rate",
        "learning_rates": "a grid around what suits this model and number of steps",
        "precision": "what this processor multiplies fast",
        "batch_size": "as many as two cores do in a few seconds",
        "micro_batches": "a small batch needs none",
        "seq_len": "nothing is longer in this data",
        "epochs": "a quarter of an hour for the table",
        "steps": "a quarter of an hour for the table",
    }
    grid = Settings(learning_rates=tuple(_RATES))
    return SettingsBeside(
        title=row.title, paper=paper, ours=of_run(run, "chatterbot-corpus", grid=grid), why=why
    )


# The three tables.


# Beyond the paper's four strategies: columns by activations, which need forward passes only.
_MORE = tuple(
    Row(model=MODEL, method="paca", rank=64, variant=variant, values={})
    for variant in ("activation", "weight_activation")
)

TABLE_2_EXPERIMENT = _experiment(
    InstructionTable(
        table=TABLE_2,
        about=(
            "The paper trains LLaMA3-8B to follow instructions, on conversations of the Oasst1 "
            "data set, and lets GPT4o-mini grade its answers to the 80 questions of MT-Bench from "
            "1 to 10.",
        ),
        notes=(
            "The settings name the longest text (768 tokens), not the usual one; the notes below "
            "the simulated memory say how many tokens would explain the paper's.",
        ),
        stated=lambda row: table_10(row.rank or 64),
        title=lambda row: f"{row.title}, rank {row.rank}",
    )
)

TABLE_3_EXPERIMENT = _experiment(
    InstructionTable(
        table=TABLE_3,
        about=(
            "A model of 70 billion weights does not fit on one GPU in 16 bits. QLoRA and QPaCA "
            "hold the frozen weights in 4 bits (NF4) and train LoRA's matrices, or PaCA's columns, "
            "in 16. The paper trains LLaMA3-8B and LLaMA3.1-70B on Oasst1 in this way and scores "
            "them by MT-Bench.",
        ),
        notes=(
            "The settings name the longest text (768 tokens), not the usual one. Both methods are "
            "explained by about the same number of tokens per micro-batch (notes below the "
            "simulated memory): what differs from the paper is the length of the texts, not what a "
            "token costs.",
            "The paper's text says that QLoRA saves 11 % of memory and 12 % of time against QPaCA; "
            "its table says the opposite, and the table is taken.",
        ),
        stated=lambda row: table_11(row.model),
        title=lambda row: f"{row.title} on {row.model}",
    )
)

TABLE_5_EXPERIMENT = _experiment(
    InstructionTable(
        table=replace(TABLE_5, rows=(*TABLE_5.rows, *_MORE)),
        about=(
            "PaCA trains a few columns of each weight. Which ones? The paper compares columns at "
            "random (with two seeds), those of the largest norm, and those that had the largest "
            "gradients in 100 batches, and finds no noticeable difference.",
            "Two more strategies are tried here that the paper has not: columns whose inputs are "
            "largest, and columns with the largest product of norm and input.",
        ),
        stated=lambda row: table_10(64),
        title=lambda row: row.title,
        has_costs=False,
    )
)
