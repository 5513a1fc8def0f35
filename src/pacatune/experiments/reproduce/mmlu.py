"""Table 1: fine-tuning on MMLU.

At the small scale SmolLM2-135M is trained to name the type of an answer, and scored on others.
"""

from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from pacatune.experiments.reproduce.comparison import fill_section
from pacatune.experiments.reproduce.experiment import Cell, Experiment, Mode, Results
from pacatune.experiments.reproduce.runs import (
    MMLU,
    UNTRAINED,
    Runs,
    cost_columns,
    cost_numbers,
    costs,
    evaluate_line,
    hub_id,
    loaded,
    text_run,
    train_line,
)
from pacatune.experiments.reproduce.scores import SPREAD_NOTE, scores_of
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
from pacatune.experiments.study.tuning import tune
from pacatune.paper.settings import Settings, table_9
from pacatune.paper.tables import TABLE_1, Quantity, Row

__all__ = ["TABLE_1_EXPERIMENT", "small_cell", "small_stated"]

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


def cells(mode: Mode) -> list[Cell]:
    """Return the work of a mode."""
    if mode == "full":
        return [_full_cell(row) for row in TABLE_1.rows]
    found = memory_cells(TABLE_1)
    if mode == "small":
        found.append(bench_cell(_bench(), _METHODS))
        found += [small_cell(row) for row in _small_rows()]
    return found


def section(mode: Mode, results: Results) -> Section:
    """Return the report on what there is."""
    part = Section(name=TABLE_1.name, title=TABLE_1.title, place=TABLE_1.place, about=list(_ABOUT))
    if mode == "full":
        columns = [*cost_columns(TABLE_1), *_score_columns()]
        fill_section(part, TABLE_1, columns, _full_numbers(results))
        return part
    columns, ours = [memory_column(TABLE_1)], simulated_memory(TABLE_1, results)
    bench = results.get("bench")
    if bench is not None:
        ours |= bench_numbers(TABLE_1, bench, {method: method for method in _METHODS})
        columns += bench_columns(TABLE_1, bench)
        part.notes.append(_BENCH_NOTE)
    ours |= _small_numbers(results)
    columns.append(_small_column())
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
            if row.method not in UNTRAINED
        ]
    return [_small_settings(row) for row in _small_rows() if row.method not in UNTRAINED]


# Full scale: the paper's models on MMLU.


def _full_run(row: Row) -> Any:
    stated = _stated(row)
    (rate,) = stated.learning_rates or (1e-4,)
    return text_run(stated, row.method, model=hub_id(row.model), data=MMLU, rate=rate)


def _full_commands(row: Row) -> tuple[str, ...]:
    is_trained = row.method not in UNTRAINED
    score = evaluate_line("mmlu", hub_id(row.model), has_adapter=is_trained)
    return (train_line(_full_run(row)), score) if is_trained else (score,)


def _full_cell(row: Row) -> Cell:
    return Cell(
        key=f"full-{row.key}",
        title=f"{row.title} on {row.model}: training on MMLU, then its test",
        methods=(row.method,),
        inputs={"row": row.key, "commands": list(_full_commands(row))},
        run=partial(_train, row),
    )


def _train(row: Row, folder: Path, tell: Callable[[str], None]) -> dict[str, Any]:
    runs = Runs(folder=folder, tell=tell)
    adapter, kept = None, {}
    if row.method not in UNTRAINED:
        report, adapter = runs.train(_full_run(row), "run")
        kept = costs(report)
    scores = runs.once("mmlu", partial(_ask_mmlu, hub_id(row.model), adapter))
    return {"scores": scores, **kept}


def _ask_mmlu(model: str, adapter: Path | None) -> dict[str, Any]:
    from pacatune.evaluation import evaluate_mmlu

    with loaded(model, adapter) as found:
        result = evaluate_mmlu(found.model, found.tokenizer, progress=True)
    categories = {name: asdict(score) for name, score in result.categories.items()}
    return {"categories": categories, "average": asdict(result.average)}


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
            found |= cost_numbers(TABLE_1, row, result)
    return found


# Small scale: steps of a small Llama, and SmolLM2-135M on the types of answers.


_SMALL_MODEL, _DATA = "SmolLM2-135M-Instruct", "types of answers"
_KEY, _PREFIX = "small_accuracy", "small-"
_STEPS, _BATCH = 16, 8
# alpha / rank is 4 in Table 9 and multiplies the rate.
_RATES = (1e-3, 2e-3, 4e-3)
_SEEDS = (0, 1)
_NUM_QUESTIONS = 300


def _small_rows() -> list[Row]:
    return [row for row in TABLE_1.rows if row.model == MODEL]


def _bench() -> Any:
    return bench_config("small", _METHODS, tokens=(1024,), seq_len=512, rank=RANK)


def small_stated(row: Row) -> Settings:
    """Return the settings of a line's small runs: Table 9's, but for what two cores cannot do."""
    return replace(
        _stated(row),
        batch_size=_BATCH,
        micro_batches=1,
        warmup=0.1,
        epochs=None,
        steps=_STEPS,
        learning_rates=_RATES,
    )


def small_cell(row: Row) -> Cell:
    """Return the cell of one line: the best rate of a grid by validation loss, then all seeds."""
    from pacatune.data.packaged.bigbench import TYPE_PROMPT

    inputs = {
        "method": row.method,
        # Without it, a score of an earlier prompt was once kept beside those of another.
        "prompt": TYPE_PROMPT,
        "settings": {} if row.method in UNTRAINED else asdict(small_stated(row)),
        "model": _SMALL_MODEL,
        "data": _DATA,
        "seeds": list(_SEEDS),
        "num_questions": _NUM_QUESTIONS,
        "dtype": small_dtype(),
    }
    rank = "" if row.rank is None else f", rank {row.rank}"
    return Cell(
        key=f"{_PREFIX}{row.key}",
        title=f"{_SMALL_MODEL} on {_DATA}: {row.title}{rank}",
        methods=(row.method,),
        inputs=inputs,
        run=partial(_run_small, row),
    )


def _run_small(row: Row, folder: Path, tell: Callable[[str], None]) -> dict[str, Any]:
    from pacatune.data.packaged import default_cache, prepare_model, prepare_type_choices

    cache = default_cache()
    model = str(prepare_model(cache, tell))
    train_data, heldout = prepare_type_choices(cache, tell)
    runs = Runs(folder=folder, tell=tell)

    def score(name: str, adapter: Path | None) -> float:
        found = runs.once(f"score-{name}", partial(_ask_small, model, adapter, heldout))
        return float(found["accuracy"]["value"])

    if row.method in UNTRAINED:
        return {"values": {"0": score("untrained", None)}, "learning_rate": None}

    def train(rate: float, seed: int) -> tuple[dict[str, Any], Path]:
        run = _small_run(row, model, str(train_data), rate, seed)
        return runs.train(run, f"rate{rate:g}-seed{seed}")

    tuned = tune(_RATES, _SEEDS, train, lambda run: float(run[0]["eval_loss_after"]))
    scores = {str(seed): score(f"seed{seed}", adapter) for seed, (_, adapter) in tuned.runs.items()}
    return {
        "values": scores,
        "learning_rate": tuned.rate,
        "rates": {str(rate): loss for rate, loss in tuned.curve.items()},
        "num_trainable_parameters": tuned.runs[_SEEDS[0]][0]["num_trainable_parameters"],
    }


def _small_run(row: Row, model: str, data: str, rate: float, seed: int) -> Any:
    return text_run(
        small_stated(row),
        row.method,
        model=model,
        data={"path": data, "format": "prompt-completion", "eval_fraction": 0.03},
        rate=rate,
        dtype=small_dtype(),
        seed=seed,
        eval_strategy="no",
        save_strategy="no",
    )


def _ask_small(model: str, adapter: Path | None, heldout: Path) -> dict[str, Any]:
    from pacatune.evaluation import evaluate_choice, read_questions

    questions = read_questions(heldout)
    with loaded(model, adapter, dtype=small_dtype(), device="cpu") as found:
        result = evaluate_choice(
            found.model, found.tokenizer, questions, limit=_NUM_QUESTIONS, batch_size=16
        )
    return {"accuracy": asdict(result.accuracy), "chance": result.chance}


def _small_column() -> Column:
    return Column(
        quantity=Quantity(
            key=_KEY, title="accuracy of a small model", unit="%", kind="score", margin=1.0
        ),
        paper=TABLE_1.quantity(_AVERAGE),
        is_same=False,
        model=_SMALL_MODEL,
        about=f"{_SMALL_MODEL}, trained for {_STEPS} steps on {_BATCH} questions each to name the "
        f"type of the answer (one of six; BIG-bench), and scored on {_NUM_QUESTIONS} others; for "
        f"every method the best of the learning rates {', '.join(f'{r:g}' for r in _RATES)} by "
        f"validation loss. "
        f"{SPREAD_NOTE}",
    )


def _small_numbers(results: Results) -> dict[tuple[str, str], Measured]:
    lines = {row.key: f"{_PREFIX}{row.key}" for row in TABLE_1.rows}
    scores = scores_of(lines, results, _NUM_QUESTIONS)
    return {(line, _KEY): score for line, score in scores.items()}


def _small_settings(row: Row) -> SettingsBeside:
    stated = small_stated(row)
    data = {"path": "train.jsonl", "format": "prompt-completion"}
    run = text_run(stated, row.method, model=_SMALL_MODEL, data=data, rate=1e-3)
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
        ours=of_run(run, f"{_DATA} (BIG-bench)", grid=stated),
        why=why,
    )


TABLE_1_EXPERIMENT = Experiment(
    name=TABLE_1.name,
    title=TABLE_1.title,
    place=TABLE_1.place,
    methods=tuple(TABLE_1.methods()),
    cells=cells,
    section=section,
    settings=settings,
    cannot={},
)
