"""Runs of `pacatune train` by the paper's settings, and what scores them."""

import contextlib
import json
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from examples.packaged import default_cache, prepare
from experiments.paper import Line, Table
from experiments.paper.settings import Settings, of_line
from pacatune.measure.presets import PRESETS
from pacatune.methods import METHODS
from pacatune.reports.rows import Job, Row, spread_of_mean
from pacatune.training import RunConfig
from pacatune.training.config_file import to_values
from pacatune.training.folder import REPORT_NAME
from pacatune.training.recipe import start_or_resume

if TYPE_CHECKING:
    from pacatune.adapters.loading import LoadedModel

SEED = 42
"""That of the authors' scripts for MMLU and for Oasst1 on the 8B model."""


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
        adapter["paca"] = {
            "r": rank,
            "paca_alpha": alpha,
            "selection": selection,
            "selection_batches": 100,  # as the paper's
            "random_seed": seed,
        }
    elif METHODS[method].has_adapter:
        dropout = stated.dropout or 0.0
        adapter["lora"] = {"r": rank, "lora_alpha": int(alpha), "lora_dropout": dropout}
    length: dict[str, Any] = {"num_train_epochs": stated.epochs or 1.0}
    if stated.steps is not None:
        length = {"max_steps": stated.steps}
    options = {
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
        model={"path": model, "dtype": dtype},
        data=dict(data),
        training=options | length | training,
        # As the paper's code computes; its memory and times are without lean layers.
        lean="off",
        **adapter,
    )


@dataclass(frozen=True)
class Work:
    """What a job does one after the other in its folder; what an earlier call ended is skipped."""

    folder: Path

    def train(self, run: RunConfig, name: str) -> tuple[dict[str, Any], Path]:
        """Train a run, going on from its last checkpoint; return its report and its folder."""
        output = self.folder / name
        run.training.output_dir = str(output)
        with self.quiet(name) as console:
            start_or_resume(run, console=console)
        values: dict[str, Any] = json.loads((output / REPORT_NAME).read_text(encoding="utf-8"))
        return values, output

    @contextlib.contextmanager
    def quiet(self, name: str) -> Iterator[Any]:
        """Send what is printed meanwhile to NAME.log, and free memory afterwards."""
        from rich.console import Console

        from experiments.study.tasks import released

        self.folder.mkdir(parents=True, exist_ok=True)
        with (
            (self.folder / f"{name}.log").open("a", encoding="utf-8") as file,
            contextlib.redirect_stdout(file),
            contextlib.redirect_stderr(file),
            released(),
        ):
            yield Console(file=file, highlight=False, markup=False)


@contextlib.contextmanager
def loaded(model: str, adapter: Path | None, **options: Any) -> Iterator["LoadedModel"]:
    """Load a model to be scored, PaCA's columns kept in its weights."""
    from pacatune import resident
    from pacatune.adapters.loading import load_language_model

    found = load_language_model(model, adapter, **options)
    with resident(found.model):
        yield found


def hub_id(line: Line) -> str:
    """Return the hub's name of a line's model."""
    return PRESETS[line.model].hub_id


def row_of(table: Table, line: Line, key: str, value: float, **more: Any) -> Row:
    """Return a number of ours under the names of the paper's column and line."""
    options = {"unit": table.quantity(key).unit, "model": line.model, **more}
    return Row(what=table.quantity(key).title, method=line.title, value=value, **options)


def cost_rows(table: Table, line: Line, report: Mapping[str, Any], **more: Any) -> list[Row]:
    """Return memory and time of a run, as far as its report knows them, in the paper's units."""
    rows = []
    if "memory" in {one.key for one in table.quantities}:
        rows.append(row_of(table, line, "memory", report["peak_memory_bytes"] / 1e9, **more))
        if report["step_ms"] is not None:
            unit = {"h": 3.6e6, "min": 6e4}[table.quantity("time").unit]
            time = report["step_ms"] * report["num_steps"] / unit
            rows.append(row_of(table, line, "time", time, **more))
    return rows


Score = Callable[[Work, Line, Path | None], list[Row]]
"""Scores a line's adapter, or its model alone where there is none."""


def full_jobs(
    table: Table,
    data: Mapping[str, Any],
    score: Score,
    inputs: Mapping[str, Any],
    prepare_data: Callable[[], object] | None = None,
) -> list[Job]:
    """Return the jobs of a table at the paper's own size: trained at its rates, the best scored.

    Each run's configuration is made here, so that what is wrong with it is known before any ends.
    `prepare_data` makes a file of `data`, before the first run reads it.
    """
    jobs = []
    for line in table.lines:
        rates = of_line(table.name, line).learning_rates or ()
        runs = {rate: _full_run(table, line, data, rate) for rate in rates if line.is_trained}
        jobs.append(
            Job(
                key=f"full-{line.key}",
                title=f"{line.title} on {line.model}: training and scoring",
                inputs={
                    "line": line.key,
                    "runs": {f"{rate:g}": to_values(run.settled()) for rate, run in runs.items()},
                    **inputs,
                },
                run=partial(_run_full, table, line, runs, score, prepare_data),
            )
        )
    return jobs


def _full_run(table: Table, line: Line, data: Mapping[str, Any], rate: float) -> RunConfig:
    """Return the run of a line that trains; its variant says how columns are chosen."""
    strategy, _, number = line.variant.partition("-")
    return text_run(
        of_line(table.name, line),
        line.method,
        model=hub_id(line),
        data=data,
        rate=rate,
        seed=SEED + int(number or 1) - 1,
        selection=strategy or "random",
    )


def _run_full(
    table: Table,
    line: Line,
    runs: dict[float, RunConfig],
    score: Score,
    prepare_data: Callable[[], object] | None,
    folder: Path,
) -> list[Row]:
    work = Work(folder)
    if not runs:
        return score(work, line, None)
    if prepare_data is not None:
        prepare_data()
    done = {rate: work.train(run, f"rate-{rate:g}") for rate, run in runs.items()}
    best, note = next(iter(done)), ""
    if len(done) > 1:
        best = min(done, key=lambda rate: float(done[rate][0]["eval_loss_after"]))
        note = rate_note(line, best, runs)
    report, adapter = done[best]
    return [*cost_rows(table, line, report, note=note), *score(work, line, adapter)]


def rate_note(line: Line, rate: float, rates: Sequence[float] | Mapping[float, Any]) -> str:
    """Say which learning rate was taken, if it lies at the edge of its grid."""
    if rate not in (min(rates), max(rates)):
        return ""
    return f"{line.title}: the best learning rate, {rate:g}, is at the edge of its grid."


def arm_row(
    table: Table,
    line: Line,
    key: str,
    found: Any,
    rates: Sequence[float],
    **more: Any,
) -> Row:
    """Return what the arm of a study reached, with the 95 % interval of several seeds."""
    each = {str(seed): value for seed, value in found.values.items()}
    mean = statistics.mean(each.values())
    if len(each) > 1:
        spread = spread_of_mean([*each.values()])
        more |= {"low": mean - spread, "high": mean + spread}
    note = rate_note(line, found.learning_rate, rates)
    return row_of(table, line, key, mean, n=len(each), each=each, note=note, **more)


def study_job(
    line: Line,
    title: str,
    task: str,
    read: Callable[[Any], list[Row]],
    arm: Mapping[str, Any],
    **options: Any,
) -> Job:
    """Return the job of a study of one arm; `read` makes rows of what the arm reached."""
    from experiments.study.config import Arm, StudyConfig
    from experiments.study.runner import run_study

    config = StudyConfig(
        task=str(default_cache() / f"{task}.yaml"),
        arms={line.method: Arm(method=line.method, **arm)},
        forgetting_tokens=0,
        **options,
    )

    def run(folder: Path) -> list[Row]:
        folder.parent.mkdir(parents=True, exist_ok=True)
        prepare(task)
        (found,) = run_study(config, folder).values()
        if found.mean is None:
            raise RuntimeError(f"no run of {line.title} ended well: {' '.join(found.failures)}")
        return read(found)

    return Job(key=f"small-{line.key}", title=title, inputs=asdict(config), run=run)
