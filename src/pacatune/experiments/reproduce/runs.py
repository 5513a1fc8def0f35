"""Runs of language models and images: trained, scored, kept; and the columns of their numbers.

Everything happens in this process by `pacatune.training` and `pacatune.evaluation`; the commands
that `--print` shows do the same by hand.
"""

import contextlib
import json
import math
import shlex
import statistics
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pacatune import study
from pacatune.experiments.reproduce.comparison import Source
from pacatune.experiments.reproduce.experiment import Cell, Measured, Result, Results
from pacatune.experiments.reproduce.settings import SettingsBeside, of_run
from pacatune.experiments.reproduce.verdicts import Column, Numbers, same_column
from pacatune.files.owned_folder import to_json, write_whole
from pacatune.measure.presets import PRESETS
from pacatune.methods import METHODS
from pacatune.paper.settings import Settings, of_line
from pacatune.paper.tables import Quantity, Row, Table
from pacatune.study.statistics import best_of, is_at_edge
from pacatune.training import (
    DataConfig,
    LoraSection,
    ModelConfig,
    PacaSection,
    RunConfig,
    TrainingConfig,
)

if TYPE_CHECKING:
    from rich.console import Console

    from pacatune.adapters.loading import LoadedModel

Tell = Callable[[str], None]

# The seed of the authors' scripts for MMLU and for Oasst1 on the 8B model.
SEED = 42
# Where `python -m examples.packaged` puts what small runs need.
PACKAGED = "~/.cache/pacatune"
_REPORT = "report.json"  # written last: a run that has it has ended well


def text_run(
    stated: Settings,
    method: str,
    *,
    model: str,
    data: Mapping[str, Any],
    rate: float,
    dtype: str = "bfloat16",
    seed: int = SEED,
    selection: str = "random",
    **training: Any,
) -> RunConfig:
    """Return a run of `pacatune train` with stated settings; `training` has further options."""
    rank, micro_batches = stated.rank or 1, stated.micro_batches or 1
    alpha = float(rank) if stated.alpha is None else stated.alpha
    adapter: dict[str, Any] = {}
    if METHODS[method].is_paca:
        adapter["paca"] = PacaSection(
            r=rank,
            paca_alpha=alpha,
            selection=selection,
            selection_batches=100,  # as the paper's
            random_seed=seed,
        )
    elif METHODS[method].has_adapter:
        dropout = stated.dropout or 0.0
        adapter["lora"] = LoraSection(r=rank, lora_alpha=int(alpha), lora_dropout=dropout)
    length: dict[str, Any] = (
        {"num_train_epochs": stated.epochs or 1.0}
        if stated.steps is None
        else {"max_steps": stated.steps}
    )
    options: dict[str, Any] = {
        "output_dir": "run",
        "learning_rate": rate,
        "lr_scheduler_type": stated.scheduler or "linear",
        "warmup_steps": stated.warmup or 0.0,
        "per_device_train_batch_size": (stated.batch_size or 1) // micro_batches,
        "gradient_accumulation_steps": micro_batches,
        "max_length": stated.seq_len,
        "bf16": dtype == "bfloat16",
        "seed": seed,
        "report_to": "none",
    }
    return RunConfig(
        method=method,
        model=ModelConfig(path=model, dtype=dtype),  # type: ignore[arg-type]
        data=DataConfig(**data),
        **adapter,
        training=TrainingConfig(**options | length | training),
        # As the paper's code computes; its memory and times are without lean layers.
        lean="off",
    )


@dataclass(frozen=True, kw_only=True)
class Runs:
    """What a cell does one after the other in its folder; what an earlier call ended is skipped."""

    folder: Path
    tell: Tell

    def train(self, run: Any, name: str) -> tuple[dict[str, Any], Path]:
        """Train a run, going on from its last checkpoint; return its report and its folder."""
        output = self.folder / name
        run.training.output_dir = run.training.given["output_dir"] = str(output)
        if not (output / _REPORT).is_file():
            has_checkpoint = output.is_dir() and any(output.glob("checkpoint-*"))
            self.tell(f"  training {name}{', from its last checkpoint' * has_checkpoint}")
            from pacatune.training import train

            with self.quiet(name) as console:
                train(run, resume=has_checkpoint, overwrite=not has_checkpoint, console=console)
        values: dict[str, Any] = json.loads((output / _REPORT).read_text(encoding="utf-8"))
        return values, output

    def once(self, name: str, compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Return JSON values that are computed, of an earlier call if it has ended there."""
        path = self.folder / f"{name}.json"
        if not path.is_file():
            self.tell(f"  {name}")
            with self.quiet(name):
                values = compute()
            write_whole(path, to_json(values))
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return found

    @contextlib.contextmanager
    def quiet(self, name: str) -> Iterator["Console"]:
        """Send what is printed meanwhile to NAME.log, and free memory afterwards."""
        from rich.console import Console

        from pacatune.study.tasks import released

        self.folder.mkdir(parents=True, exist_ok=True)
        with (
            (self.folder / f"{name}.log").open("a", encoding="utf-8") as file,
            contextlib.redirect_stdout(file),
            contextlib.redirect_stderr(file),
            released(),
        ):
            yield Console(file=file, highlight=False, markup=False)


@contextlib.contextmanager
def loaded(
    model: str, adapter: Path | None, *, dtype: str = "auto", device: str = "auto"
) -> Iterator["LoadedModel"]:
    """Load a model to be scored, PaCA's columns kept in its weights."""
    from pacatune import resident
    from pacatune.adapters.loading import load_language_model

    found = load_language_model(model, adapter, dtype=dtype, device=device)  # type: ignore[arg-type]
    with resident(found.model):
        yield found


@dataclass(frozen=True, kw_only=True)
class FullScale:
    """The lines of a table at the paper's own size: trained at its rates, the best one scored."""

    table: Table
    data: Mapping[str, Any]
    """Options of the data section."""
    data_name: str
    test: str
    """What scores a run, by its name and as the end of `training on ..., then ...`."""
    then: str
    about: str
    """How the scores are obtained, for the reader."""
    title: Callable[[Row], str]
    """Title of a line's settings."""
    command: Callable[[Row], tuple[str, ...]]
    """Kind and options of the `pacatune evaluate` that scores a line by hand."""
    score: Callable[[Runs, Row, Path | None], dict[str, Any]]
    """Scores a line's adapter."""
    read: Callable[[Any], Mapping[str, Mapping[str, float]]]
    """What `score` returned -> score of the paper -> value, low, high."""

    def run(self, row: Row, rate: float) -> RunConfig:
        """Return the run of a line that trains; its variant says how columns are chosen."""
        strategy, _, number = row.variant.partition("-")
        return text_run(
            of_line(self.table.name, row),
            row.method,
            model=hub_id(row),
            data=self.data,
            rate=rate,
            seed=SEED + int(number or 1) - 1,
            selection=strategy or "random",
        )

    def commands(self, row: Row) -> tuple[str, ...]:
        """Return what runs for a line, as it is typed."""
        kind, *options = self.command(row)
        adapter = ["--adapter", "RUN"] if row.is_trained else []
        words = ["--model", hub_id(row), *adapter, *options, "--output", "DIR"]
        score = shlex.join(["pacatune", "evaluate", kind, *words])
        return ("pacatune train --config RUN.yaml", score) if row.is_trained else (score,)

    def source(self) -> Source:
        """Return the cells, and columns of memory, time and scores."""
        return Source(cells=[self._cell(row) for row in self.table.rows], columns=self._columns)

    def settings(self) -> list[SettingsBeside]:
        """Return ours beside the paper's."""
        found = []
        for row in self.table.rows:
            if row.is_trained:
                stated = of_line(self.table.name, row)
                ours = of_run(self.run(row, 1e-3), self.data_name, stated.learning_rates)
                beside = SettingsBeside(
                    title=self.title(row),
                    paper=stated,
                    ours=ours,
                    why={"model": "its name on the hub"},
                    commands=self.commands(row),
                )
                found.append(beside)
        return found

    def _cell(self, row: Row) -> Cell:
        rates = of_line(self.table.name, row).learning_rates or ()
        has_grid = len(rates) > 1

        def run(folder: Path, tell: Tell) -> Result:
            runs = Runs(folder=folder, tell=tell)
            if not row.is_trained:
                return {"scores": self.score(runs, row, None)}

            def train(rate: float, seed: int) -> tuple[dict[str, Any], Path]:
                return runs.train(self.run(row, rate), f"rate-{rate:g}")

            if has_grid:
                chosen, found = tune(rates, (SEED,), train)
                report, adapter = found[SEED]
            else:  # nothing is chosen, and there may be no validation data
                (report, adapter), chosen = runs.train(self.run(row, rates[0]), "run"), {}
            return {"scores": self.score(runs, row, adapter), **chosen, **_costs(report)}

        grid = {"rates": list(rates)} if has_grid else {}
        return Cell(
            key=f"full-{row.key}",
            title=f"{row.title} on {row.model}: training on {self.data_name}, then {self.then}",
            methods=(row.method,),
            inputs={"row": row.key, **grid, "commands": list(self.commands(row))},
            run=run,
        )

    def _columns(self, results: Results) -> list[tuple[Column, Numbers]]:
        """Return memory, time and scores."""
        costs = "By `pacatune train`, on the accelerator named below."
        found: list[tuple[Column, Numbers]] = []
        for paper in self.table.quantities:
            key = f"full_{paper.key}"
            if paper.kind in ("memory", "time"):
                column = same_column(paper, key, f"{paper.title}, measured", costs)
            elif paper.kind == "score":
                column = same_column(paper, key, f"{self.test}, {paper.title}", self.about)
            else:
                continue
            numbers = {
                row.key: number
                for row in self.table.rows
                if (result := results.get(f"full-{row.key}")) is not None
                and (number := self._number(result, paper)) is not None
            }
            found.append((column, numbers))
        return found

    def _number(self, result: Result, paper: Quantity) -> Measured | None:
        """Return what a line reached in a quantity of the paper, in its unit."""
        if paper.kind == "score":
            score = self.read(result["scores"]).get(paper.key)
            return None if score is None else _with_rate(result, **score)
        key, units = {
            "memory": ("peak_memory_bytes", {"GB": 1e9}),
            "time": ("training_ms", {"h": 3.6e6, "min": 6e4}),
        }[paper.kind]
        return (
            Measured.exact(result[key] / units[paper.unit], "measured") if key in result else None
        )


def tune(
    rates: Sequence[float],
    seeds: Sequence[int],
    train: Callable[[float, int], tuple[dict[str, Any], Path]],
) -> tuple[dict[str, Any], dict[int, tuple[dict[str, Any], Path]]]:
    """Train at each rate with the first seed, and at the best one with all; return seed -> run."""
    first = {rate: train(rate, seeds[0]) for rate in rates}
    curve = {rate: float(report["eval_loss_after"]) for rate, (report, _) in first.items()}
    best = best_of(curve)
    assert best is not None, "there are rates"
    chosen = {"learning_rate": best, "rates": {str(rate): loss for rate, loss in curve.items()}}
    others = {seed: train(best, seed) for seed in seeds[1:]}
    return chosen, {seeds[0]: first[best], **others}


def hub_id(row: Row) -> str:
    """Return the hub's name of a line's model."""
    return PRESETS[row.model].hub_id


def _costs(report: dict[str, Any]) -> dict[str, Any]:
    return {
        "peak_memory_bytes": report["peak_memory_bytes"],
        "training_ms": (report["step_ms"] or 0.0) * report["num_steps"],
        "num_trainable_parameters": report["num_trainable_parameters"],
    }


def _with_rate(result: Result, *, value: float, low: float, high: float) -> Measured:
    """Return a score of a result, with the best learning rate of its grid."""
    rate = result.get("learning_rate")
    return Measured(
        value=value,
        low=low,
        high=high,
        origin="measured",
        rate=rate,
        at_edge=is_at_edge(rate, [float(tried) for tried in result.get("rates", {})]),
    )


# The small scale: one method at its best rate of a grid, over some seeds.

SPREAD_NOTE = (
    "Intervals are two standard errors on either side of the mean: of the seeds, whose spread is "
    "taken from all lines together, and for accuracies of the number of test examples as well."
)


def study_cell(row: Row, title: str, task: str, arm: study.Arm, **options: Any) -> Cell:
    """Return the cell of a study of one arm, without the general text of others."""
    config = study.StudyConfig(
        task=f"{PACKAGED}/{task}.yaml", arms={row.method: arm}, forgetting_tokens=0, **options
    )

    def run(folder: Path, tell: Tell) -> Result:
        from rich.console import Console

        folder.parent.mkdir(parents=True, exist_ok=True)
        console = Console(highlight=False, markup=False)
        result = study.run_study(config, folder, console=console)
        (arm,) = result.arms.values()
        if arm.mean is None:
            raise RuntimeError(f"no run of {arm.name} ended well: {' '.join(arm.failures)}")
        return {
            "metric": result.metric,
            "values": {str(seed): value for seed, value in arm.values.items()},
            "mean": arm.mean,
            "std": arm.std,
            "learning_rate": arm.learning_rate,
            "rates": {str(rate): value for rate, value in arm.rates.items()},
            "num_trainable_parameters": arm.num_trainable_parameters,
            "warnings": result.warnings,
        }

    return Cell(
        key=f"small-{row.key}",
        title=f"training {title}",
        methods=(row.method,),
        inputs=asdict(config),
        run=run,
    )


def scores_source(
    rows: Sequence[Row],
    cell: Callable[[Row], Cell],
    column: Column,
    num_examples: int | None = None,
) -> Source:
    """Return the scores of small runs of lines; accuracies on so many examples are in per cent."""
    lines = {row.key: f"small-{row.key}" for row in rows}
    return Source(
        cells=[cell(row) for row in rows],
        columns=lambda results: [(column, scores_of(lines, results, num_examples))],
    )


def scores_of(
    cells: Mapping[str, str], results: Results, num_examples: int | None = None
) -> dict[str, Measured]:
    """Return line -> mean over seeds, with two standard errors, for line -> key of its cell.

    The spread over seeds is that of all lines together.
    """
    found = {line: results[key] for line, key in cells.items() if key in results}
    std = pooled_std(result["values"].values() for result in found.values())
    return {line: _score(result, std, num_examples) for line, result in found.items()}


def pooled_std(groups: Iterable[Collection[float]]) -> float:
    """Return the standard deviation within groups, from all of them; 0 where none has two values.

    Values of a group differ in nothing but chance. That of two alone is often next to nothing.
    """
    several = [list(values) for values in groups if len(values) > 1]
    freedom = sum(len(values) - 1 for values in several)
    squares = sum(statistics.variance(values) * (len(values) - 1) for values in several)
    return math.sqrt(squares / freedom) if freedom else 0.0


def _score(result: Result, std: float, num_examples: int | None) -> Measured:
    unit = 1.0 if num_examples is None else 100.0
    values = list(result["values"].values())
    error = std / math.sqrt(len(values))
    mean = statistics.mean(values)
    if num_examples is not None:
        error = math.hypot(error, math.sqrt(max(mean * (1 - mean), 0.0) / num_examples))
    spread = 2 * error * unit
    value = mean * unit
    return _with_rate(result, value=value, low=value - spread, high=value + spread)
