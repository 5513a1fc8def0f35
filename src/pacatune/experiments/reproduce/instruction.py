"""Tables 2, 3 and 5: instruction tuning on Oasst1, scored by MT-Bench.

At the small scale SmolLM2-135M is trained on questions and answers. A judge of answers is not to be
had offline, so what is compared there is the loss on held-out answers.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from pacatune.experiments.reproduce.comparison import Source, table_experiment
from pacatune.experiments.reproduce.experiment import Cell, Experiment, Mode, Scale
from pacatune.experiments.reproduce.runs import (
    PACKAGED,
    SPREAD_NOTE,
    FullScale,
    Runs,
    hub_id,
    scores_source,
    study_cell,
)
from pacatune.experiments.reproduce.settings import SettingsBeside, of_run
from pacatune.experiments.reproduce.simulation import memory_source
from pacatune.experiments.reproduce.steps import MODEL, small_dtype, steps_source
from pacatune.experiments.reproduce.verdicts import Column
from pacatune.paper.settings import of_line
from pacatune.paper.tables import TABLE_2, TABLE_3, TABLE_5, Quantity, Row, Table
from pacatune.study import Arm


def _experiment(
    table: Table, title: Callable[[Row], str], about: tuple[str, ...], notes: tuple[str, ...] = ()
) -> Experiment:
    """Return the experiment of a table; `title` is that of a line's settings."""
    has_costs = any(quantity.key == "memory" for quantity in table.quantities)
    full = FullScale(
        table=table,
        # Oasst1 as the authors' scripts take it: its best paths as plain texts.
        data={
            "path": "timdettmers/openassistant-guanaco",
            "format": "text",
            "eval_split": "test",
        },
        data_name="Oasst1",
        test="MT-Bench",
        then="MT-Bench",
        about="By `pacatune evaluate mt-bench` with GPT-4o-mini as the judge; 95 % intervals.",
        title=title,
        command=_command,
        score=_judge,
        read=lambda scores: scores,
    )
    small = [row for row in table.rows if row.is_trained and row.model == MODEL]

    def sources(mode: Mode) -> list[Source]:
        if mode == "full":
            return [full.source()]
        found = [memory_source(table, explain=True)] if has_costs else []
        if mode == "small" and has_costs:
            found.append(steps_source(table, tokens=768, seq_len=768))
        if mode == "small":
            found.append(scores_source(small, small_cell, _small_column(table)))
        return found

    def settings(scale: Scale) -> list[SettingsBeside]:
        return full.settings() if scale == "full" else [_small_settings(table, r) for r in small]

    nothing = {"simulate": "it has no memory column; there is nothing to simulate."}
    return table_experiment(
        table, about, sources, settings, notes=notes, cannot={} if has_costs else nothing
    )


# Full scale: the best rate is scored by MT-Bench.

_JUDGE = {
    "judge_url": "https://api.openai.com/v1",
    "judge_model": "gpt-4o-mini",
    "judge_key_env": "OPENAI_API_KEY",
}
_FILES = {
    "questions": "question.jsonl",
    "references": "gpt-4.jsonl",
    "judge_prompts": "judge_prompts.jsonl",
}


def _mt_bench_options(row: Row) -> dict[str, Any]:
    """Return the options of MT-Bench, by their names in MtBenchConfig."""
    held = {"quantization": "nf4"} if row.method in ("quantized", "qlora") else {}
    files = {name: f"{PACKAGED}/mt-bench-26.3/{file}" for name, file in _FILES.items()}
    return held | files | _JUDGE


def _command(row: Row) -> tuple[str, ...]:
    words = [(f"--{k.replace('_', '-')}", str(v)) for k, v in _mt_bench_options(row).items()]
    return ("mt-bench", *(word for pair in words for word in pair))


def _judge(runs: Runs, row: Row, adapter: Path | None) -> dict[str, Any]:
    """Return the mean of each category, and of all as the paper's average, with its interval.

    MT-Bench goes on by itself with the answers and judgments that its folder holds.
    """
    from pacatune.evaluation.mt_bench import MtBenchConfig, run_mt_bench

    options = _mt_bench_options(row)
    config = MtBenchConfig(
        output=runs.folder / "mt-bench",
        model=hub_id(row),
        adapter=None if adapter is None else str(adapter),
        **options | {"judge_prompts": Path(options["judge_prompts"])},
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


# Small scale: a study of one arm for each line.

_SMALL_MODEL = "SmolLM2-135M-Instruct"
_STEPS = 12
# Columns of the largest gradients need smaller ones than others.
_RATES = (5e-4, 1.5e-3, 4e-3)
# Of some 560 questions; what rates are chosen by.
_VALIDATION = 0.05


def _small_arm(row: Row) -> Arm:
    # alpha = rank: the update is not scaled, and the grid of rates is the same for every rank.
    strategy = row.variant.partition("-")[0] or "random"
    return Arm(method=row.method, rank=row.rank, selection=strategy, learning_rates=list(_RATES))


def _small_options(row: Row) -> dict[str, Any]:
    options: dict[str, Any] = {
        "model": {"dtype": small_dtype()},
        "training": {"max_steps": _STEPS, "lr_scheduler_type": "linear", "warmup_steps": 0.1},
    }
    if row.method.endswith("paca"):
        options["paca"] = {"selection_batches": 8}
    return options


def small_cell(row: Row) -> Cell:
    """Return the study of one line, whose first seed chooses the rate."""
    arm = _small_arm(row)
    how = "" if arm.selection == "random" else f", columns by {arm.selection}"
    return study_cell(
        row,
        f"{_SMALL_MODEL} by {row.method}, rank {row.rank}{how}",
        "smollm2-chat",
        arm,
        options=_small_options(row),
        # Other ones for other columns.
        seeds=[2, 3] if row.variant.endswith("-2") else [0, 1],
        validation_fraction=_VALIDATION,
    )


def _small_column(table: Table) -> Column:
    """Return the column of the held-out loss, beside the average of MT-Bench."""
    title = "loss on held-out answers, small model"
    return Column(
        quantity=Quantity("small_loss", title, "nats per token", "score", 0.02),
        paper=table.quantity("average"),
        is_inverted=True,
        model=_SMALL_MODEL,
        about=f"{_SMALL_MODEL}, {_STEPS} steps of 8 questions and answers; for every method the "
        f"best of the learning rates {', '.join(f'{rate:g}' for rate in _RATES)} on validation "
        f"data. Less is better. {SPREAD_NOTE}",
    )


def _small_settings(table: Table, row: Row) -> SettingsBeside:
    from pacatune.study.plan import arm_options
    from pacatune.study.tasks import StudyTask, merged

    base = {
        "model": {"path": _SMALL_MODEL},
        "data": {"path": "chatterbot-corpus", "eval_path": "heldout"},
        "training": {"per_device_train_batch_size": 8},
    }
    task = StudyTask("train", merged(base, _small_options(row)), _VALIDATION, 0)
    run = task.make_run(arm_options(_small_arm(row), row.rank), _RATES[0], 0, Path("run"))
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
    return SettingsBeside(
        title=row.title,
        paper=of_line(table.name, row),
        ours=of_run(run, "chatterbot-corpus", _RATES),
        why=why,
    )


TABLE_2_EXPERIMENT = _experiment(
    TABLE_2,
    title=lambda row: f"{row.title}, rank {row.rank}",
    about=(
        "The paper trains LLaMA3-8B to follow instructions, on conversations of the Oasst1 "
        "data set, and lets GPT4o-mini grade its answers to the 80 questions of MT-Bench from "
        "1 to 10.",
    ),
    notes=(
        "The settings name the longest text (768 tokens), not the usual one; the notes below "
        "the simulated memory say how many tokens would explain the paper's.",
    ),
)

TABLE_3_EXPERIMENT = _experiment(
    TABLE_3,
    title=lambda row: f"{row.title} on {row.model}",
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
)

# Beyond the paper's four strategies: columns by activations, which need forward passes only.
MORE_STRATEGIES = tuple(
    Row(model=MODEL, method="paca", rank=64, variant=variant, values={})
    for variant in ("activation", "weight_activation")
)
TABLE_5_EXPERIMENT = _experiment(
    replace(TABLE_5, rows=(*TABLE_5.rows, *MORE_STRATEGIES)),
    title=lambda row: row.title,
    about=(
        "PaCA trains a few columns of each weight. Which ones? The paper compares columns at "
        "random (with two seeds), those of the largest norm, and those that had the largest "
        "gradients in 100 batches, and finds no noticeable difference.",
        "Two more strategies are tried here that the paper has not: columns whose inputs are "
        "largest, and columns with the largest product of norm and input.",
    ),
)
