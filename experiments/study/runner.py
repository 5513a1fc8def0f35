"""Runs a study: what a folder has already is read back; then what each arm reached."""

import copy
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Any

from experiments.jobs import Finished, Job, done
from experiments.study.config import StudyConfig
from experiments.study.statistics import (
    Run,
    Study,
    best_rate,
    chosen,
    compared,
    rate_beyond,
    write_runs,
)
from experiments.study.tasks import StudyTask
from pacatune.files.owned_folder import OwnedFolder
from pacatune.reports.rows import Row, Table, spread_of_mean
from pacatune.training import RunConfig
from pacatune.training.config_file import to_values

RUNS, REPORT = "runs.csv", "report.md"
_PACKAGES = ("trl", "accelerate", "datasets")


@dataclass(frozen=True, kw_only=True)
class ArmResult:
    """What an arm reached at its best learning rate, on test data."""

    runs: Mapping[int, Run]
    """Seed -> all that was measured."""
    metric: str
    failures: list[str]

    @property
    def learning_rate(self) -> float | None:
        """Chosen on validation data; None if no rate worked with every seed that chooses."""
        return next((run["learning rate"] for run in self.runs.values()), None)

    @property
    def values(self) -> dict[int, float]:
        """Seed -> metric."""
        return {seed: run[f"test {self.metric}"] for seed, run in self.runs.items()}

    @property
    def mean(self) -> float | None:
        """The mean over seeds; None without any."""
        return fmean(self.values.values()) if self.runs else None


def run_study(
    config: StudyConfig,
    folder: Path,
    tell: Callable[[str], None] = print,
    known: Study | None = None,
) -> dict[str, ArmResult]:
    """Run what neither the folder nor `known` holds yet, and report on everything.

    The folder gets jobs/ with a file for each run, runs.csv with a line for each, and report.md. A
    run that failed is done again by the next call. Runs of `known` are taken by arm, rate and seed:
    that the same study made them is for the caller to know.
    """
    output = OwnedFolder(path=folder, kind="a study")
    with output.going_on(RUNS, REPORT):
        runner = _Runner(config, output, tell, known or {})
        runner.run_all()
        results = {
            name: ArmResult(
                runs=dict(sorted(chosen(runner.runs_of(name)).items())),
                metric=runner.task.metric,
                failures=runner.failures.get(name, []),
            )
            for name in config.arms
        }
        with output.staged() as staging:
            write_runs({folder.name: runner.ended}, staging / RUNS)
        shown = table(results)
        output.write(REPORT, "\n".join([*shown.markdown(), "", *shown.notes]) + "\n")
    return results


def _task_of(config: StudyConfig) -> Any:
    if config.command != "images":
        return StudyTask(config)
    from experiments.study.images import ImageTask

    return ImageTask(config)


class _Runner:
    """Does the runs of a study that a folder does not hold."""

    def __init__(
        self,
        config: StudyConfig,
        folder: OwnedFolder,
        tell: Callable[[str], None],
        known: Study,
    ) -> None:
        self.config, self.task = config, _task_of(config)
        self._folder, self._tell = folder, tell
        self._known = {
            (name, run["learning rate"], run["seed"]): run
            for name, runs in known.items()
            for run in runs
        }
        self._rates = {name: config.rates_of(name) for name in config.arms}
        self.ended: dict[tuple[str, float, int], Run] = {}
        """Arm, learning rate and seed -> what was measured."""
        self.failures: dict[str, list[str]] = {}

    def runs_of(self, name: str) -> list[Run]:
        """Return the runs of an arm that have ended well."""
        return [run for (arm, *_), run in self.ended.items() if arm == name]

    def run_all(self) -> None:
        """Do the runs that choose rates, the arms in turns, then those at the chosen ones."""
        seeds, number = self.config.seeds, self.config.tuning_seeds
        for name, rates in self._rates.items():  # what is wrong is said before anything runs
            self._job(name, rates[0], seeds[0])
        tried = self._rates
        for _ in range(1 + self.config.extend_grids):
            for seed in seeds[:number]:
                for place in range(max(map(len, tried.values()), default=0)):
                    for name, rates in tried.items():
                        if place < len(rates):
                            self._do(name, rates[place], seed)
            tried = self._beyond()
            for name, rates in tried.items():
                self._rates[name] = sorted([*self._rates[name], *rates])
        for seed in seeds[number:]:
            for name in self.config.arms:
                if (rate := best_rate(self.runs_of(name))) is not None:
                    self._do(name, rate, seed)

    def _beyond(self) -> dict[str, list[float]]:
        """Return one more rate for each arm whose best one is at the edge of its grid."""
        best = {name: best_rate(self.runs_of(name)) for name in self._rates}
        beyond = {name: rate_beyond(best[name], rates) for name, rates in self._rates.items()}
        return {name: [rate] for name, rate in beyond.items() if rate is not None}

    def _job(self, name: str, rate: float, seed: int) -> Job:
        run = self.task.make_run(self.config.arms[name], rate, seed, Path("unused"))
        values = to_values(run) if isinstance(run, RunConfig) else copy.deepcopy(run)
        del values["training"]["output_dir"]
        inputs = {
            "run": values,
            "test": self.task.test_options,
            "metric": self.task.metric,
            "forgetting_tokens": self.config.forgetting_tokens,
            "unrelated": self.config.unrelated,
            "rewind": self.config.rewind,
        }
        key = f"{name}-{rate:g}-{seed}"
        return Job(key=key, inputs=inputs, run=partial(self._measure, name, rate, seed))

    def _do(self, name: str, rate: float, seed: int) -> None:
        if known := self._known.get((name, rate, seed)):
            self.ended[name, rate, seed] = known
            return
        job = self._job(name, rate, seed)
        ended: Finished = done([job], self._folder, packages=_PACKAGES)[job.key]
        if ended.error is not None:
            self.failures.setdefault(name, []).append(f"{job.key}: {ended.error}")
            self._tell(f"{job.key}: failed: {ended.error}")
            return
        numbers = {row.what: row.value for row in ended.rows}
        self.ended[name, rate, seed] = {"learning rate": rate, "seed": float(seed), **numbers}
        self._tell(f"{job.key}: validation loss {numbers['validation loss']:.4f}")

    def _measure(self, name: str, rate: float, seed: int, work: Path) -> list[Row]:
        with tempfile.TemporaryDirectory(prefix="study-") as scratch:
            run = self.task.make_run(self.config.arms[name], rate, seed, Path(scratch))
            numbers = self.task.run(run)
        return [Row(what=what, method=name, value=value) for what, value in numbers.items()]


def table(results: Mapping[str, ArmResult]) -> Table:
    """Return a line for each arm: its rate, score, and difference from the first arm, by seed."""
    first, *others = results
    metric = results[first].metric
    runs, pairs = {name: result.runs for name, result in results.items()}, product(others, [first])
    differences = compared(runs, pairs, f"test {metric}", less_is_better=metric == "loss")
    cells = []
    for name, result in results.items():
        difference, shown = differences.get((name, first)), ["-", "-"]
        if difference is not None:
            shown = [f"{difference.mean:+.4f} ± {difference.half_interval:.4f}", difference.said]
        rate = "-" if result.learning_rate is None else f"{result.learning_rate:g}"
        cells.append([name, rate, str(len(result.runs)), _mean(result), *shown])
    header = ["arm", "rate", "n", f"test {metric}", f"minus {first}", ""]
    failures = [f"Failed: {text}" for result in results.values() for text in result.failures]
    note = (
        "Means over n seeds with 95 % intervals, on test data; each rate has the least loss on "
        "held-out training data. Better and worse: paired t tests, corrected for their number."
    )
    return Table(header=header, cells=cells, notes=[note, *failures])


def _mean(result: ArmResult) -> str:
    values = [*result.values.values()]
    spread = f" ± {spread_of_mean(values):.4f}" if len(values) > 1 else ""
    return f"{result.mean:.4f}{spread}" if values else "-"
