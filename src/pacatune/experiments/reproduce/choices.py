"""Small scale of Table 1: SmolLM2-135M trained to name the type of an answer, and scored on others.

Each run is `pacatune train` and `pacatune evaluate choice`, as the full scale is with MMLU.
"""

from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from pacatune.experiments.paper.settings import Settings, table_9
from pacatune.experiments.paper.tables import Quantity, Row, Table
from pacatune.experiments.reproduce.cells import Cell
from pacatune.experiments.reproduce.commands import Steps, evaluate_words
from pacatune.experiments.reproduce.compare import Column
from pacatune.experiments.reproduce.experiment import Results
from pacatune.experiments.reproduce.measured import Measured
from pacatune.experiments.reproduce.scale import small_dtype
from pacatune.experiments.reproduce.study_cells import SPREAD_NOTE, scores_of
from pacatune.experiments.reproduce.text_runs import text_run

__all__ = ["DATA", "MODEL_NAME", "choice_cell", "choice_column", "choice_numbers", "choice_stated"]

MODEL_NAME = "SmolLM2-135M-Instruct"
DATA = "types of answers"
_KEY = "small_accuracy"
_PREFIX = "small-"
_STEPS, _BATCH = 16, 8
# alpha / rank is 4 in Table 9 and multiplies the rate.
_RATES = (1e-3, 2e-3, 4e-3)
_SEEDS = (0, 1)
_NUM_QUESTIONS = 300


def choice_stated(row: Row) -> Settings:
    """Return the settings of a line's runs: Table 9's, but for what two cores cannot do."""
    return replace(
        table_9(row.model, row.method, row.rank or 8),
        batch_size=_BATCH,
        micro_batches=1,
        warmup=0.1,
        epochs=None,
        steps=_STEPS,
        learning_rates=_RATES,
    )


def choice_cell(row: Row) -> Cell:
    """Return the cell of one line: the best rate of a grid by validation loss, then all seeds."""
    inputs = {
        "method": row.method,
        "settings": {} if row.method == "none" else asdict(choice_stated(row)),
        "model": MODEL_NAME,
        "data": DATA,
        "seeds": list(_SEEDS),
        "num_questions": _NUM_QUESTIONS,
        "dtype": small_dtype(),
    }
    rank = "" if row.rank is None else f", rank {row.rank}"
    return Cell(
        key=f"{_PREFIX}{row.key}",
        title=f"{MODEL_NAME} on {DATA}: {row.title}{rank}",
        methods=(row.method,),
        inputs=inputs,
        run=partial(_run, row),
    )


def _run(row: Row, folder: Path, tell: Callable[[str], None]) -> dict[str, Any]:
    from pacatune.data.packaged.language_models import prepare_model
    from pacatune.data.packaged.packages import default_cache
    from pacatune.data.packaged.question_types import prepare_type_choices

    cache = default_cache()
    model = prepare_model(cache, tell)
    train, heldout = prepare_type_choices(cache, tell)
    work = _Work(row, str(model), train, heldout, folder, tell)
    if row.method == "none":
        return {"values": {"0": work.score(None, "untrained")}, "learning_rate": None}
    losses = {rate: work.train(rate, _SEEDS[0])["loss"] for rate in _RATES}
    best = min(losses, key=lambda rate: losses[rate])
    runs = {seed: work.train(best, seed) for seed in _SEEDS}
    values = {
        str(seed): work.score(Path(run["adapter"]), f"score-seed{seed}")
        for seed, run in runs.items()
    }
    return {
        "values": values,
        "learning_rate": best,
        "rates": {str(rate): loss for rate, loss in losses.items()},
        "num_trainable_parameters": runs[_SEEDS[0]]["num_trainable_parameters"],
    }


class _Work:
    """The runs of one line; each is kept by itself, so that a killed cell goes on."""

    def __init__(
        self,
        row: Row,
        model: str,
        train: Path,
        heldout: Path,
        folder: Path,
        tell: Callable[[str], None],
    ) -> None:
        self.row, self.model, self.data, self.heldout = row, model, train, heldout
        self.steps = Steps(folder=folder, tell=tell, place="here")

    def train(self, rate: float, seed: int) -> dict[str, Any]:
        """Train at a rate with a seed; return the validation loss and the adapter's folder."""
        run = text_run(
            choice_stated(self.row),
            self.row.method,
            model=self.model,
            data={"path": str(self.data), "format": "prompt-completion", "eval_fraction": 0.03},
            rate=rate,
            dtype=small_dtype(),
            seed=seed,
            eval_strategy="no",
            save_strategy="no",
        )
        report, folder = self.steps.train(run, f"rate{rate:g}-seed{seed}")
        return {
            "loss": report["eval_loss_after"],
            "adapter": str(folder),
            "num_trainable_parameters": report["num_trainable_parameters"],
        }

    def score(self, adapter: Path | None, name: str) -> float:
        """Return the accuracy on held-out questions."""
        more = ["--data", str(self.heldout), "--limit", str(_NUM_QUESTIONS), "--batch-size", "16"]
        words = evaluate_words(
            "choice", self.model, adapter, *more, "--dtype", small_dtype(), "--device", "cpu"
        )
        result = self.steps.evaluate(words, name)["result"]
        (scores,) = result.values()
        return float(scores["accuracy"]["value"])


def choice_column(table: Table) -> Column:
    """Return the column of the accuracy, beside MMLU's average."""
    return Column(
        quantity=Quantity(
            key=_KEY, title="accuracy of a small model", unit="%", kind="score", margin=1.0
        ),
        paper=table.quantity("average"),
        is_same=False,
        about=f"{MODEL_NAME}, trained for {_STEPS} steps on {_BATCH} questions each to name the "
        f"type of the answer (one of six; BIG-bench), and scored on {_NUM_QUESTIONS} others; for "
        f"every method the best of the learning rates {', '.join(f'{r:g}' for r in _RATES)} by "
        f"validation loss. "
        f"{SPREAD_NOTE}",
    )


def choice_numbers(table: Table, results: Results) -> dict[tuple[str, str], Measured]:
    """Return the accuracies that there are."""
    cells = {row.key: f"{_PREFIX}{row.key}" for row in table.rows}
    scores = scores_of(cells, results, _NUM_QUESTIONS)
    return {(line, _KEY): score for line, score in scores.items()}
