"""Table 1: fine-tuning on MMLU.

At the small scale SmolLM2-135M is trained to name the type of an answer, and scored on others.
"""

from collections.abc import Mapping
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from pacatune.experiments.reproduce.comparison import Source, table_experiment
from pacatune.experiments.reproduce.experiment import Cell, Mode, Result, Scale
from pacatune.experiments.reproduce.runs import (
    PACKAGED,
    SPREAD_NOTE,
    FullScale,
    Runs,
    Tell,
    hub_id,
    loaded,
    scores_source,
    text_run,
    tune,
)
from pacatune.experiments.reproduce.settings import SettingsBeside, of_run
from pacatune.experiments.reproduce.simulation import memory_source
from pacatune.experiments.reproduce.steps import MODEL, small_dtype, steps_source
from pacatune.experiments.reproduce.verdicts import Column
from pacatune.paper.settings import Settings, of_line
from pacatune.paper.tables import TABLE_1, Quantity, Row

_ABOUT = (
    "The paper fine-tunes three language models on the training questions of MMLU, a test of 57 "
    "subjects with four answers to each question, and asks the test questions with five examples "
    "before each. It compares PaCA, which trains a few columns of every weight, with LoRA, DoRA "
    "and MosLoRA, which train small matrices beside every weight.",
)
_BENCH_NOTE = (
    "In the paper LoRA, DoRA and MosLoRA have dropout 0.1, which takes time and memory. Steps of "
    "the small model are measured without it, all three alike, which favours them."
)
# The paper's columns -> groups of lm-eval, as `pacatune evaluate mmlu` names them.
_CATEGORIES = {"humanities": "Hums.", "stem": "STEM", "social": "Social.", "other": "Other"}


def _sources(mode: Mode) -> list[Source]:
    if mode == "full":
        return [_FULL.source()]
    found = [memory_source(TABLE_1)]
    if mode == "small":
        found.append(steps_source(TABLE_1, tokens=1024, seq_len=512, note=_BENCH_NOTE))
        rows = [row for row in TABLE_1.rows if row.model == MODEL]
        found.append(scores_source(rows, small_cell, _small_column(), _NUM_QUESTIONS))
    return found


def _settings(scale: Scale) -> list[SettingsBeside]:
    if scale == "full":
        return _FULL.settings()
    rows = [row for row in TABLE_1.rows if row.model == MODEL and row.is_trained]
    return [_small_settings(row) for row in rows]


# Full scale: the paper's models on MMLU.


def _score(runs: Runs, row: Row, adapter: Path | None) -> dict[str, Any]:
    def compute() -> dict[str, Any]:
        from pacatune.evaluation import evaluate_mmlu

        with loaded(hub_id(row), adapter) as found:
            result = evaluate_mmlu(found.model, found.tokenizer, progress=True)
        categories = {name: asdict(score) for name, score in result.categories.items()}
        return {"categories": categories, "average": asdict(result.average)}

    return runs.once("mmlu", compute)


def _read(scores: Any) -> Mapping[str, Mapping[str, float]]:
    """Return each score in per cent, with two standard errors."""
    found = {name: scores["categories"].get(group) for name, group in _CATEGORIES.items()}
    intervals = {}
    for name, score in (found | {"average": scores["average"]}).items():
        if score is not None:
            value, spread = 100 * score["value"], 200 * (score["stderr"] or 0.0)
            intervals[name] = {"value": value, "low": value - spread, "high": value + spread}
    return intervals


_FULL = FullScale(
    table=TABLE_1,
    # The training questions, in the words of the evaluation, loss on the answers.
    data={"path": "cais/mmlu", "name": "auxiliary_train", "format": "mmlu"},
    data_name="MMLU",
    test="MMLU",
    then="its test",
    about="By `pacatune evaluate mmlu`, five examples; two standard errors.",
    title=lambda row: f"{row.title}, rank {row.rank}, on {row.model}",
    command=lambda row: ("mmlu",),
    score=_score,
    read=_read,
)

# Small scale: steps of a small Llama, and SmolLM2-135M on the types of answers.

_SMALL_MODEL, _DATA = "SmolLM2-135M-Instruct", "types of answers"
_STEPS, _BATCH = 16, 8
# alpha / rank is 4 in Table 9 and multiplies the rate.
_RATES = (1e-3, 2e-3, 4e-3)
_SEEDS = (0, 1)
_NUM_QUESTIONS = 300


def small_stated(row: Row) -> Settings:
    """Return the settings of a line's small runs: Table 9's, but for what two cores cannot do."""
    return replace(
        of_line(TABLE_1.name, row),
        batch_size=_BATCH,
        micro_batches=1,
        warmup=0.1,
        epochs=None,
        steps=_STEPS,
        learning_rates=_RATES,
    )


def small_cell(row: Row) -> Cell:
    """Return the cell of one line: the best rate of a grid by validation loss, then all seeds."""
    inputs = {
        "method": row.method,
        "settings": asdict(small_stated(row)) if row.is_trained else {},
        "model": _SMALL_MODEL,
        "data": _DATA,
        "seeds": list(_SEEDS),
        "num_questions": _NUM_QUESTIONS,
        "dtype": small_dtype(),
    }
    rank = "" if row.rank is None else f", rank {row.rank}"
    return Cell(
        key=f"small-{row.key}",
        title=f"{_SMALL_MODEL} on {_DATA}: {row.title}{rank}",
        methods=(row.method,),
        inputs=inputs,
        run=partial(_run_small, row),
    )


def _run_small(row: Row, folder: Path, tell: Tell) -> Result:
    packaged = Path(PACKAGED).expanduser()
    model, data = str(packaged / "smollm2-135m-instruct-q4_1"), packaged / "type-choices"
    for path in (model, data):
        if not Path(path).is_dir():
            raise FileNotFoundError(
                f"{path} is missing; in a checkout, `python -m examples.packaged smollm2 "
                "type-choices` prepares it."
            )
    runs = Runs(folder=folder, tell=tell)

    def score(name: str, adapter: Path | None) -> float:
        found = runs.once(f"score-{name}", partial(_ask_small, model, adapter, data / "test.jsonl"))
        return float(found["accuracy"]["value"])

    if not row.is_trained:
        return {"values": {"0": score("untrained", None)}, "learning_rate": None}

    def train(rate: float, seed: int) -> tuple[dict[str, Any], Path]:
        given = {"path": str(data / "train.jsonl"), "format": "prompt-completion"}
        run = text_run(
            small_stated(row),
            row.method,
            model=model,
            data=given | {"eval_fraction": 0.03},
            rate=rate,
            dtype=small_dtype(),
            seed=seed,
            eval_steps=_STEPS + 1,  # before and after alone
            save_strategy="no",
        )
        return runs.train(run, f"rate{rate:g}-seed{seed}")

    chosen, found = tune(_RATES, _SEEDS, train)
    return {
        "values": {str(seed): score(f"seed{seed}", run[1]) for seed, run in found.items()},
        **chosen,
        "num_trainable_parameters": found[_SEEDS[0]][0]["num_trainable_parameters"],
    }


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
        quantity=Quantity("small_accuracy", "accuracy of a small model", "%", "score", 1.0),
        paper=TABLE_1.quantity("average"),
        model=_SMALL_MODEL,
        about=f"{_SMALL_MODEL}, trained for {_STEPS} steps on {_BATCH} questions each to name the "
        f"type of the answer (one of six; BIG-bench), and scored on {_NUM_QUESTIONS} others; for "
        f"every method the best of the learning rates {', '.join(f'{r:g}' for r in _RATES)} by "
        f"validation loss. {SPREAD_NOTE}",
    )


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
        paper=of_line(TABLE_1.name, row),
        ours=of_run(run, f"{_DATA} (BIG-bench)", _RATES),
        why=why,
    )


TABLE_1_EXPERIMENT = table_experiment(TABLE_1, _ABOUT, _sources, _settings)
