"""Full scale of Tables 2, 3 and 5: train on Oasst1 at each rate, score the best by MT-Bench."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from pacatune.experiments.paper.settings import Settings
from pacatune.experiments.paper.tables import SCORES, Quantity, Row, Table
from pacatune.experiments.reproduce.cells import Cell
from pacatune.experiments.reproduce.commands import Steps, evaluate_words, shell_line, train_words
from pacatune.experiments.reproduce.compare import Column
from pacatune.experiments.reproduce.experiment import Results
from pacatune.experiments.reproduce.llm_columns import full_numbers
from pacatune.experiments.reproduce.measured import Measured
from pacatune.experiments.reproduce.text_runs import GUANACO, SEED, hub_id, text_run

__all__ = ["full_cells", "full_commands", "full_run", "full_scores", "score_columns"]

_JUDGE = ("--judge-url", "https://api.openai.com/v1", "--judge-model", "gpt-4o-mini")
_KEY = ("--judge-key-env", "OPENAI_API_KEY")
_UNTRAINED = ("none", "quantized")


def full_run(stated: Settings, row: Row, rate: float) -> Any:
    """Return the run of a line at one learning rate.

    Args:
        stated: Of the paper.
        row: The line; of Table 5, its variant is the selection.
        rate: Learning rate.
    """
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


def _judge_words(row: Row, adapter: Path | None) -> list[str]:
    quantized = ("--quantization", "nf4") if row.method in ("quantized", "qlora") else ()
    return evaluate_words("mt-bench", hub_id(row.model), adapter, *quantized, *_JUDGE, *_KEY)


def full_commands(stated: Settings, row: Row) -> tuple[str, ...]:
    """Return what runs for a line, as it is typed."""
    adapter = None if row.method in _UNTRAINED else Path("RUN")
    judge = shell_line([*_judge_words(row, adapter), "--output", "DIR"])
    if adapter is None:
        return (judge,)
    run = full_run(stated, row, (stated.learning_rates or (1e-3,))[0])
    return (shell_line(train_words(run, Path("RUN.yaml"))), judge)


def full_cells(table: Table, stated: Callable[[Row], Settings]) -> list[Cell]:
    """Return a cell for each line.

    Args:
        table: Table 2, 3 or 5.
        stated: The settings of a line.
    """
    return [
        Cell(
            key=f"full-{row.key}",
            title=f"{row.title} on {row.model}: training on Oasst1, then MT-Bench",
            methods=(row.method,),
            inputs={
                "row": row.key,
                "rates": list(stated(row).learning_rates or ()),
                "commands": list(full_commands(stated(row), row)),
            },
            run=partial(_run, row, stated(row)),
        )
        for row in table.rows
    ]


def _run(row: Row, stated: Settings, folder: Path, tell: Callable[[str], None]) -> dict[str, Any]:
    steps = Steps(folder=folder, tell=tell, place="apart")
    if row.method in _UNTRAINED:
        return {"scores": _scores(steps.mt_bench(_judge_words(row, None), "mt-bench"))}
    found = {}
    for rate in stated.learning_rates or ():
        found[rate] = steps.train(full_run(stated, row, rate), f"rate-{rate:g}")
    losses = {rate: report["eval_loss_after"] for rate, (report, _) in found.items()}
    best = min(losses, key=lambda rate: losses[rate])
    report, adapter = found[best]
    return {
        "scores": _scores(steps.mt_bench(_judge_words(row, adapter), "mt-bench")),
        "learning_rate": best,
        "rates": {str(rate): loss for rate, loss in losses.items()},
        "peak_memory_bytes": report["peak_memory_bytes"],
        "training_ms": (report["step_ms"] or 0.0) * report["num_steps"],
        "num_trainable_parameters": report["num_trainable_parameters"],
    }


def _scores(result: dict[str, Any]) -> dict[str, Any]:
    """Return the mean of each category, and of all as the paper's average, with its interval."""
    found = {}
    for line in result["table"]:
        mean, low, high = line["mean"], line["low"], line["high"]
        if mean is not None:
            name = "average" if line["name"] == "all" else line["name"]
            ends = (mean, mean) if low is None else (low, high)
            found[name] = {"value": mean, "low": ends[0], "high": ends[1]}
    return found


def score_columns() -> list[Column]:
    """Return MT-Bench's columns."""
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


def full_scores(table: Table, results: Results) -> dict[tuple[str, str], Measured]:
    """Return all numbers of the lines that were run in full."""
    found: dict[tuple[str, str], Measured] = {}
    for row in table.rows:
        result = results.get(f"full-{row.key}")
        if result is None:
            continue
        for name, score in result["scores"].items():
            found[row.key, f"full_{name}"] = Measured(origin="measured", **score)
        if "peak_memory_bytes" in result and "memory" in row.values:
            found |= full_numbers(table, row, result)
    return found
