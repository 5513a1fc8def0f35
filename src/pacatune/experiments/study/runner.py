"""Runs a study: every run once, whatever interrupts it."""

import dataclasses
import gc
import math
import tempfile
import time
from pathlib import Path
from typing import Any

from rich.console import Console

from pacatune.experiments.study.config import StudyConfig
from pacatune.experiments.study.plan import Plan, make_plan
from pacatune.experiments.study.records import Records
from pacatune.experiments.study.report import OUTPUTS, write_report
from pacatune.experiments.study.result import PACKAGES, RunRecord, StudyResult
from pacatune.experiments.study.summary import Place, best_rate, summarise
from pacatune.experiments.study.tuning import rate_beyond
from pacatune.files.result_folder import ResultFolder
from pacatune.reports.provenance import versions
from pacatune.training.progress import show_warnings

RESULT_NAME = "study.json"
RUNS_NAME = "runs"


def run_study(config: StudyConfig, folder: Path, *, console: Console | None = None) -> StudyResult:
    """Run what the folder does not hold yet, and report on everything.

    Args:
        config: The study.
        folder: Gets runs/ with one file for each run, study.json, report.md and plots; one that
            holds runs of this or an earlier study is continued: equal runs are not done again,
            failed ones are.
        console: Where to show progress; standard output when None.

    Returns:
        What study.json holds.

    Raises:
        ValueError: If the configuration cannot be used, or another process is in the folder.
        FileExistsError: If the folder holds something else.
        KeyboardInterrupt: If a signal stopped it; finished runs are kept.
    """
    console = console or Console(highlight=False)
    output = ResultFolder(path=folder, mark=RESULT_NAME, kind="a study", others=OUTPUTS)
    plan = make_plan(config, console.print)
    with output.opened():
        result = summarise(plan, _run_all(plan, folder, console))
        write_report(result, folder)
        output.write({"finished": True, **result.to_dict()})
    return result


def _run_all(plan: Plan, folder: Path, console: Console) -> dict[Place, RunRecord]:
    runner = _Runner(plan, Records(folder / RUNS_NAME), console)
    # What is there by now stays: each run collects garbage twice, and need not look at it.
    gc.freeze()
    try:
        return runner.run_all()
    except KeyboardInterrupt:
        raise KeyboardInterrupt(
            f"stopped with {runner.num_done} of {plan.num_runs} runs done; the same command "
            "continues"
        ) from None
    finally:
        gc.unfreeze()


def pending_runs(plan: Plan, folder: Path) -> int:
    """Return how many of the runs that choose the rates have no result in a folder yet."""
    runner = _Runner(plan, Records(folder / RUNS_NAME), Console(quiet=True))
    return sum(runner.find(place) is None for place in runner.tuning_runs())


class _Runner:
    """Does the runs of a plan that are not recorded.

    Args:
        plan: The runs.
        records: Those that have ended.
        console: Gets a line per run.
    """

    def __init__(self, plan: Plan, records: Records, console: Console) -> None:
        self._plan, self._records, self._console = plan, records, console
        self._ended: dict[Place, RunRecord] = {}
        self._keys: dict[Place, str] = {}

    @property
    def num_done(self) -> int:
        """Return how many runs have ended so far."""
        return len(self._ended)

    def run_all(self) -> dict[Place, RunRecord]:
        """Do the runs that choose rates, then those at the chosen ones."""
        for place in self.tuning_runs():
            self._key(place)  # looks at the data
        show_warnings(self._plan.task.warnings, self._console)
        for place in self.tuning_runs():
            self._do(place)
        for _ in range(self._plan.config.extend_grids):
            self._extend_grids()
        for place in self._final_runs():
            self._do(place)
        return self._ended

    def tuning_runs(self) -> list[Place]:
        """Return the runs that choose rates; the arms take turns."""
        seeds = self._plan.config.seeds[: self._plan.config.tuning_seeds]
        most = max(len(arm.learning_rates) for arm in self._plan.arms.values())
        return [
            (name, arm.learning_rates[number], seed)
            for seed in seeds
            for number in range(most)
            for name, arm in self._plan.arms.items()
            if number < len(arm.learning_rates)
        ]

    def _extend_grids(self) -> None:
        """Try one more rate for each arm whose best one is at the edge of its grid."""
        seeds = self._plan.config.seeds[: self._plan.config.tuning_seeds]
        beyond = {
            name: rate_beyond(best_rate(self._plan, self._ended, name), arm.learning_rates)
            for name, arm in self._plan.arms.items()
        }
        for name, rate in beyond.items():
            if rate is not None:
                self._plan.add_rate(name, rate)
        for seed in seeds:
            for name, rate in beyond.items():
                if rate is not None:
                    self._do((name, rate, seed))

    def _final_runs(self) -> list[Place]:
        chosen = {name: best_rate(self._plan, self._ended, name) for name in self._plan.arms}
        return [
            (name, rate, seed)
            for seed in self._plan.config.seeds[self._plan.config.tuning_seeds :]
            for name, rate in chosen.items()
            if rate is not None
        ]

    def find(self, place: Place) -> RunRecord | None:
        """Return the record of a run that has ended well."""
        record = self._records.find(self._key(place))
        return None if record is None or record.error is not None else record

    def _key(self, place: Place) -> str:
        if place not in self._keys:
            self._keys[place] = self._plan.key(self._plan.make_run(*place, Path("unused")))
        return self._keys[place]

    def _do(self, place: Place) -> None:
        name, rate, seed = place
        record = self.find(place)
        note = "from an earlier call"
        if record is None:
            record = self._run(place)
            self._records.write(record)
            note = f"{record.seconds:.0f} s"
        # Equal runs of an arm with another name count as well.
        self._ended[place] = record = dataclasses.replace(record, arm=name)
        metric = self._plan.metric
        outcome = f"failed: {record.error}"
        if record.error is None:
            outcome = f"validation {metric} {record.validation[metric]:.4f} ({note})"
        self._console.print(
            f"{self.num_done}/{self._plan.num_runs}  {name}, rate {rate:g}, seed {seed}: {outcome}",
            soft_wrap=True,
            markup=False,
        )
        self._console.file.flush()  # somebody may follow a log

    def _run(self, place: Place) -> RunRecord:
        name, rate, seed = place
        start = time.perf_counter()
        with tempfile.TemporaryDirectory(prefix="pacatune-study-") as scratch:
            run = self._plan.make_run(name, rate, seed, Path(scratch))
            known: dict[str, Any] = {
                "key": self._key(place),
                "arm": name,
                "learning_rate": rate,
                "seed": seed,
                "versions": versions(*PACKAGES),
            }
            try:
                measured = self._plan.task.run(run, Console(quiet=True))
                _refuse_not_finite({"train_loss": measured.train_loss, **measured.validation})
                _refuse_not_finite({**measured.test, **measured.forgetting})
            except Exception as error:  # whatever it is, the other runs go on
                text = " ".join(str(error).split())
                known["error"] = f"{type(error).__name__}: {text}"
                return RunRecord(**known, seconds=time.perf_counter() - start)
        values = {f.name: getattr(measured, f.name) for f in dataclasses.fields(measured)}
        return RunRecord(**known, **values, seconds=time.perf_counter() - start)


def _refuse_not_finite(values: dict[str, float | None]) -> None:
    for name, value in values.items():
        if value is not None and not math.isfinite(value):
            raise FloatingPointError(f"{name} is {value}: training diverged; lower the rate.")
