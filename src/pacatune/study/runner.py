"""Runs a study: every run once, whatever interrupts it; and what each arm reached."""

import math
import tempfile
import time
from collections.abc import Collection
from dataclasses import asdict
from pathlib import Path

from rich.console import Console

from pacatune.files.owned_folder import OwnedFolder
from pacatune.names import choose
from pacatune.reports.rows import Finished, Job, Row, done
from pacatune.study.config import StudyConfig
from pacatune.study.plan import Plan, key_of, make_plan
from pacatune.study.report import OUTPUTS, REPORT_NAME, write_report
from pacatune.study.result import PACKAGES, Place, StudyResult, best_rate, numbers_of, summarise
from pacatune.study.statistics import rate_beyond
from pacatune.training.progress import show_warnings

RESULT_NAME = "study.json"
_UNITS = {"step": "ms", "kept for backward": "bytes"}
_COUNTED = ("trained parameters", "steps", "kept for backward")


class StudyPaused(Exception):
    """Runs of a study are left, as was asked; what there is has been reported."""


def run_study(
    config: StudyConfig,
    folder: Path,
    *,
    console: Console | None = None,
    max_hours: float | None = None,
    arms: Collection[str] | None = None,
) -> StudyResult:
    """Run what the folder does not hold yet, and report on everything.

    Args:
        config: The study.
        folder: Gets jobs/ with one file for each run, study.json, report.md and plots; one that
            holds runs of this or an earlier study is continued: equal runs are not done again,
            failed ones are.
        console: Where to show progress; standard output when None.
        max_hours: Start no run after so many hours.
        arms: Names of the arms to run; all when None.

    Returns:
        What study.json holds.

    Raises:
        ValueError: If the configuration cannot be used, or another process is in the folder.
        FileExistsError: If the folder holds something else.
        KeyboardInterrupt: If a signal stopped it; finished runs are kept.
        StudyPaused: If runs are left because of `max_hours` or `arms`.
    """
    if max_hours is not None and not max_hours > 0:
        raise ValueError(f"`max_hours` ({max_hours}) must be above 0.")
    chosen = {choose(name, config.arms, option="arms") for name in arms or config.arms}
    end = math.inf if max_hours is None else time.monotonic() + 3600 * max_hours
    output, plan = _study_folder(folder), make_plan(config)
    console = console or Console(highlight=False)
    with output.going_on(RESULT_NAME, *OUTPUTS):
        output.write_json(RESULT_NAME, {"finished": False})
        runner = _Runner(plan, output, console, chosen, end)
        try:
            runner.run_all()
        except KeyboardInterrupt:
            raise KeyboardInterrupt(
                f"stopped {runner.how_far}; the same command continues"
            ) from None
        result = summarise(plan, runner.ended)
        if runner.has_skipped:
            number = f"{len(runner.ended)} of {plan.num_runs} runs"
            result.warnings.insert(0, f"unfinished: {number}.")
        write_report(result, output)
        output.write_json(RESULT_NAME, {"finished": not runner.has_skipped, **asdict(result)})
    if runner.has_skipped:
        raise StudyPaused(
            f"paused {runner.how_far}, which {folder / REPORT_NAME} shows; the same command "
            "continues"
        )
    return result


def pending_runs(plan: Plan, folder: Path) -> int:
    """Return how many of the runs that choose the rates have no result in a folder yet."""
    runner = _Runner(plan, _study_folder(folder), Console(quiet=True), set(), 0.0)
    return sum(runner.find(place) is None for place in runner.tuning_runs())


def _study_folder(folder: Path) -> OwnedFolder:
    return OwnedFolder(path=folder, kind="a study")


class _Runner:
    """Does the runs of a plan that a folder does not hold."""

    def __init__(
        self, plan: Plan, folder: OwnedFolder, console: Console, arms: set[str], end: float
    ) -> None:
        self._plan, self._folder, self._console = plan, folder, console
        self._arms, self._end = arms, end
        self.has_skipped = False
        """Whether runs were left because of their arm or the time."""
        self.ended: dict[Place, Finished] = {}
        self._jobs: dict[Place, Job] = {}
        seeds, number = plan.config.seeds, plan.config.tuning_seeds
        self._tuning_seeds, self._other_seeds = seeds[:number], seeds[number:]

    @property
    def how_far(self) -> str:
        """How much is done, as a part of a sentence."""
        return f"with {len(self.ended)} of {self._plan.num_runs} runs done"

    def run_all(self) -> None:
        """Do the runs that choose rates, then those at the chosen ones."""
        for place in self.tuning_runs():
            self._job(place)  # looks at the data
        show_warnings(self._plan.task.warnings, self._console)
        for place in self.tuning_runs():
            self._do(place)
        for _ in range(self._plan.config.extend_grids):
            self._extend_grids()
        chosen = {name: rate for name in self._plan.arms if (rate := self._tuned_rate(name))}
        for seed in self._other_seeds:
            for name, rate in chosen.items():
                self._do((name, rate, seed))

    def _tuned_rate(self, name: str) -> float | None:
        """Return the best rate of an arm whose tuning is over; None if no rate worked."""
        places = [place for place in self.tuning_runs() if place[0] == name]
        is_tuned = all(place in self.ended for place in places)
        return best_rate(self._plan, self.ended, name) if is_tuned else None

    def tuning_runs(self) -> list[Place]:
        """Return the runs that choose rates; the arms take turns."""
        most = max(len(arm.learning_rates) for arm in self._plan.arms.values())
        return [
            (name, arm.learning_rates[number], seed)
            for seed in self._tuning_seeds
            for number in range(most)
            for name, arm in self._plan.arms.items()
            if number < len(arm.learning_rates)
        ]

    def _extend_grids(self) -> None:
        """Try one more rate for each arm whose best one is at the edge of its grid."""
        beyond = {
            name: rate
            for name, arm in self._plan.arms.items()
            if (rate := rate_beyond(self._tuned_rate(name), arm.learning_rates))
        }
        for name, rate in beyond.items():
            self._plan.add_rate(name, rate)
        for seed in self._tuning_seeds:
            for name, rate in beyond.items():
                self._do((name, rate, seed))

    def find(self, place: Place) -> Finished | None:
        """Return what is there of a run, if it has ended well."""
        job = self._job(place)
        found = done([job], self._folder, until=0).get(job.key)
        return None if found is None or found.error else found

    def _job(self, place: Place) -> Job:
        if place not in self._jobs:
            inputs = self._plan.inputs(self._plan.make_run(*place, Path("unused")))
            self._jobs[place] = Job(
                key=key_of(inputs), inputs=inputs, run=lambda _: self._measure(place)
            )
        return self._jobs[place]

    def _do(self, place: Place) -> None:
        name, rate, seed = place
        found, note = self.find(place), "from an earlier call"
        if found is None:
            if name not in self._arms or time.monotonic() >= self._end:
                self.has_skipped = True
                return
            job = self._job(place)
            found = done([job], self._folder, packages=PACKAGES)[job.key]
            note = f"{found.provenance['seconds']:.0f} s"
        self.ended[place] = found
        what, outcome = f"validation {self._plan.chosen_by}", f"failed: {found.error}"
        if found.error is None:
            outcome = f"{what} {numbers_of(found)[what]:.4f} ({note})"
        self._console.print(
            f"{len(self.ended)}/{self._plan.num_runs}  {name}, rate {rate:g}, seed {seed}: "
            f"{outcome}",
            soft_wrap=True,
            markup=False,
        )
        self._console.file.flush()  # somebody may follow a log

    def _measure(self, place: Place) -> list[Row]:
        name, rate, seed = place
        with tempfile.TemporaryDirectory(prefix="pacatune-study-") as scratch:
            run = self._plan.make_run(name, rate, seed, Path(scratch))
            numbers = self._plan.task.run(run)
        return [
            Row(
                what=what,
                method=name,
                model=Path(run.model.path).name,
                setting=f"rate {rate:g}, seed {seed}",
                value=value,
                unit=_UNITS.get(what, ""),
                origin="counted" if what in _COUNTED else "measured",
            )
            for what, value in numbers.items()
        ]
