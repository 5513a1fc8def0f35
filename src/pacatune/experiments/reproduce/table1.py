"""Table 1: fine-tuning on MMLU."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal

from pacatune.experiments.paper.settings import Settings, table_9
from pacatune.experiments.paper.tables import TABLE_1, Quantity, Row
from pacatune.experiments.reproduce.bench_cells import bench_cell, bench_config, machine_of
from pacatune.experiments.reproduce.beside import fill_section
from pacatune.experiments.reproduce.cells import Cell
from pacatune.experiments.reproduce.choices import (
    DATA,
    MODEL_NAME,
    choice_cell,
    choice_column,
    choice_numbers,
    choice_stated,
)
from pacatune.experiments.reproduce.commands import Steps, evaluate_words, shell_line, train_words
from pacatune.experiments.reproduce.compare import Column
from pacatune.experiments.reproduce.experiment import Experiment, Mode, Results, SettingsBeside
from pacatune.experiments.reproduce.llm_columns import (
    MODEL,
    bench_columns,
    bench_numbers,
    full_columns,
    full_numbers,
)
from pacatune.experiments.reproduce.measured import Measured
from pacatune.experiments.reproduce.memory_columns import (
    memory_cells,
    memory_column,
    simulated_memory,
)
from pacatune.experiments.reproduce.section import Section
from pacatune.experiments.reproduce.settings_of import of_run
from pacatune.experiments.reproduce.text_runs import MMLU, hub_id, text_run

__all__ = ["EXPERIMENT"]

_ABOUT = (
    "The paper fine-tunes three language models on the training questions of MMLU, a test of 57 "
    "subjects with four answers to each question, and asks the test questions with five examples "
    "before each. It compares PaCA, which trains a few columns of every weight, with LoRA, DoRA "
    "and MosLoRA, which train small matrices beside every weight.",
)
_METHODS = TABLE_1.trained_methods
_BENCH_NOTE = (
    "In the paper LoRA, DoRA and MosLoRA have dropout 0.1, which takes time and memory. Steps of "
    "the small model are measured without it, all three alike, which favours them."
)
# The paper's columns -> groups of lm-eval, as `pacatune evaluate mmlu` names them.
_CATEGORIES = {"humanities": "Hums.", "stem": "STEM", "social": "Social.", "other": "Other"}
_AVERAGE = "average"


def _stated(row: Row) -> Settings:
    return table_9(row.model, row.method, row.rank or 8)


def _full_run(row: Row) -> Any:
    stated = _stated(row)
    (rate,) = stated.learning_rates or (1e-4,)
    return text_run(stated, row.method, model=hub_id(row.model), data=MMLU, rate=rate)


def _full_words(row: Row, adapter: Path | None) -> list[str]:
    return evaluate_words("mmlu", hub_id(row.model), adapter)


def _full_commands(row: Row) -> tuple[str, ...]:
    adapter = None if row.method == "none" else Path("RUN")
    score = shell_line([*_full_words(row, adapter), "--output", "DIR"])
    if adapter is None:
        return (score,)
    return (shell_line(train_words(_full_run(row), Path("RUN.yaml"))), score)


def _full_cell(row: Row) -> Cell:
    return Cell(
        key=f"full-{row.key}",
        title=f"{row.title} on {row.model}: training on MMLU, then its test",
        methods=(row.method,),
        inputs={"row": row.key, "commands": list(_full_commands(row))},
        run=partial(_train, row),
    )


def _train(row: Row, folder: Path, tell: Callable[[str], None]) -> dict[str, Any]:
    steps = Steps(folder=folder, tell=tell, place="apart")
    if row.method == "none":
        return {"scores": steps.evaluate(_full_words(row, None), "mmlu")["result"]}
    report, adapter = steps.train(_full_run(row), "run")
    return {
        "scores": steps.evaluate(_full_words(row, adapter), "mmlu")["result"],
        "peak_memory_bytes": report["peak_memory_bytes"],
        "training_ms": (report["step_ms"] or 0.0) * report["num_steps"],
        "num_trainable_parameters": report["num_trainable_parameters"],
    }


def _score_columns() -> list[Column]:
    return [
        Column(
            quantity=Quantity(
                key=f"full_{name}",
                title=f"MMLU, {TABLE_1.quantity(name).title}",
                unit="%",
                kind="score",
                margin=TABLE_1.quantity(name).margin,
            ),
            paper=TABLE_1.quantity(name),
            is_same=True,
            about="By `pacatune evaluate mmlu`, five examples; two standard errors.",
        )
        for name in (*_CATEGORIES, _AVERAGE)
    ]


def _full_numbers(results: Results) -> dict[tuple[str, str], Measured]:
    found: dict[tuple[str, str], Measured] = {}
    for row in TABLE_1.rows:
        result = results.get(f"full-{row.key}")
        if result is None:
            continue
        groups = result["scores"]["categories"]
        scores = {name: groups.get(group) for name, group in _CATEGORIES.items()}
        scores[_AVERAGE] = result["scores"]["average"]
        for name, score in scores.items():
            if score is not None:
                value, spread = 100 * score["value"], 200 * (score["stderr"] or 0.0)
                found[row.key, f"full_{name}"] = Measured(
                    value=value, low=value - spread, high=value + spread, origin="measured"
                )
        if "peak_memory_bytes" in result:
            found |= full_numbers(TABLE_1, row, result)
    return found


def _small_rows() -> list[Row]:
    return [row for row in TABLE_1.rows if row.model == MODEL]


def _bench() -> Any:
    return bench_config("small", _METHODS, tokens=(1024,), seq_len=512, rank=8)


def cells(mode: Mode) -> list[Cell]:
    """Return the work of a mode."""
    if mode == "full":
        return [_full_cell(row) for row in TABLE_1.rows]
    found = memory_cells(TABLE_1)
    if mode == "small":
        found.append(bench_cell(_bench(), _METHODS))
        found += [choice_cell(row) for row in _small_rows()]
    return found


def section(mode: Mode, results: Results) -> Section:
    """Return the report on what there is."""
    part = Section(name=TABLE_1.name, title=TABLE_1.title, place=TABLE_1.place, about=list(_ABOUT))
    if mode == "full":
        fill_section(
            part, TABLE_1, [*full_columns(TABLE_1), *_score_columns()], _full_numbers(results)
        )
        return part
    columns, ours = [memory_column(TABLE_1)], simulated_memory(TABLE_1, results)
    bench = results.get("bench")
    if bench is not None:
        ours |= bench_numbers(TABLE_1, bench, {method: method for method in _METHODS})
        columns += bench_columns(TABLE_1, machine_of(bench))
        part.notes.append(_BENCH_NOTE)
    ours |= choice_numbers(TABLE_1, results)
    columns.append(choice_column(TABLE_1))
    fill_section(part, TABLE_1, columns, ours)
    return part


def settings(scale: Literal["small", "full"]) -> list[SettingsBeside]:
    """Return ours beside the paper's."""
    if scale == "full":
        return [
            SettingsBeside(
                title=f"{row.title}, rank {row.rank}, on {row.model}",
                paper=_stated(row),
                ours=of_run(_full_run(row), "MMLU"),
                why={"model": "its name on the hub"},
                commands=_full_commands(row),
            )
            for row in TABLE_1.rows
            if row.method != "none"
        ]
    return [_small_settings(row) for row in _small_rows() if row.method != "none"]


def _small_settings(row: Row) -> SettingsBeside:
    stated = choice_stated(row)
    data = {"path": "train.jsonl", "format": "prompt-completion"}
    run = text_run(stated, row.method, model=MODEL_NAME, data=data, rate=1e-3)
    why = {
        "model": "the largest real one that comes as a Python package",
        "data": "MMLU's training questions do not come as a package; these do",
        "learning_rates": "a grid for every method, since the model is another",
        "precision": "what this processor multiplies fast",
        "micro_batches": "a batch of short questions needs none",
        "warmup": "the paper's 100 steps are more than all of these",
        "epochs": "a quarter of an hour for the table",
        "steps": "a quarter of an hour for the table",
    }
    return SettingsBeside(
        title=f"{row.title}, rank {row.rank}",
        paper=_stated(row),
        ours=of_run(run, f"{DATA} (BIG-bench)", grid=stated),
        why=why,
    )


EXPERIMENT = Experiment(
    name=TABLE_1.name,
    title=TABLE_1.title,
    place=TABLE_1.place,
    methods=tuple(TABLE_1.methods()),
    cells=cells,
    section=section,
    settings=settings,
    cannot={},
)
