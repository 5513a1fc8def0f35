"""Runs a study: every run once, whatever interrupts it; and what each arm reached."""

import dataclasses
import gc
import math
import tempfile
import time
from collections.abc import Collection, Mapping
from pathlib import Path

from rich.console import Console

from pacatune.files.owned_folder import OwnedFolder
from pacatune.names import choose
from pacatune.reports.provenance import versions
from pacatune.study.config import StudyConfig
from pacatune.study.plan import Plan, make_plan
from pacatune.study.report import OUTPUTS, REPORT_NAME, write_report
from pacatune.study.result import (
    ArmResult,
    Measured,
    Records,
    RunRecord,
    StudyResult,
    study_folder,
)
from pacatune.study.statistics import (
    best_of,
    compare,
    is_at_edge,
    mean_of,
    median_of,
    rate_beyond,
    std_of,
)
from pacatune.training.progress import show_warnings

RESULT_NAME = "study.json"
# Whose versions are recorded beside those of every report.
_PACKAGES = ("trl", "accelerate", "datasets")
# Numbers of trained parameters that differ by more are not called equal.
_EQUAL_SHARE = 0.05

Place = tuple[str, float, int]
"""Arm, learning rate, seed."""
Ended = Mapping[Place, RunRecord]
"""What has run, failed or not."""


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
        folder: Gets runs/ with one file for each run, study.json, report.md and plots; one that
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
    console = console or Console(highlight=False)
    output = study_folder(folder)
    plan = make_plan(config)
    with output.going_on(RESULT_NAME, *OUTPUTS):
        output.write_json(RESULT_NAME, {"finished": False})
        runner = _Runner(plan, output, console, arms=chosen, end=end)
        # What is there by now stays: each run collects garbage twice, and need not look at it.
        gc.freeze()
        try:
            ended = runner.run_all()
        except KeyboardInterrupt:
            raise KeyboardInterrupt(
                f"stopped with {runner.num_done} of {plan.num_runs} runs done; the same command "
                "continues"
            ) from None
        finally:
            gc.unfreeze()
        is_finished = not runner.has_skipped
        result = _summarise(plan, ended)
        if not is_finished:
            result.warnings.insert(0, f"unfinished: {runner.num_done} of {plan.num_runs} runs.")
        write_report(result, output)
        output.write_json(RESULT_NAME, {"finished": is_finished, **result.to_dict()})
    if not is_finished:
        raise StudyPaused(
            f"paused with {runner.num_done} of {plan.num_runs} runs done, which "
            f"{folder / REPORT_NAME} shows; the same command continues"
        )
    return result


def pending_runs(plan: Plan, folder: Path) -> int:
    """Return how many of the runs that choose the rates have no result in a folder yet."""
    runner = _Runner(plan, study_folder(folder), Console(quiet=True))
    return sum(runner.find(place) is None for place in runner.tuning_runs())


class _Runner:
    """Does the runs of a plan that are not recorded."""

    def __init__(
        self,
        plan: Plan,
        folder: OwnedFolder,
        console: Console,
        *,
        arms: Collection[str] | None = None,
        end: float = math.inf,
    ) -> None:
        self._plan, self._records, self._console = plan, Records(folder), console
        self._arms, self._end = set(plan.arms if arms is None else arms), end
        self.has_skipped = False
        """Whether runs were left because of their arm or the time."""
        self._ended: dict[Place, RunRecord] = {}
        self._keys: dict[Place, str] = {}
        seeds, number = plan.config.seeds, plan.config.tuning_seeds
        self._tuning_seeds, self._other_seeds = seeds[:number], seeds[number:]

    @property
    def num_done(self) -> int:
        """Return how many runs have ended so far."""
        return len(self._ended)

    def run_all(self) -> Ended:
        """Do the runs that choose rates, then those at the chosen ones."""
        for place in self.tuning_runs():
            self._key(place)  # looks at the data
        show_warnings(self._plan.task.warnings, self._console)
        for place in self.tuning_runs():
            self._do(place)
        for _ in range(self._plan.config.extend_grids):
            self._extend_grids()
        chosen = {name: rate for name in self._plan.arms if (rate := self._tuned_rate(name))}
        for seed in self._other_seeds:
            for name, rate in chosen.items():
                self._do((name, rate, seed))
        return self._ended

    def _tuned_rate(self, name: str) -> float | None:
        """Return the best rate of an arm whose tuning is over; None if no rate worked."""
        places = [place for place in self.tuning_runs() if place[0] == name]
        is_tuned = all(place in self._ended for place in places)
        return _best_rate(self._plan, self._ended, name) if is_tuned else None

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

    def find(self, place: Place) -> RunRecord | None:
        """Return the record of a run that has ended well and has the metric."""
        record = self._records.find(self._key(place))
        if record is None or record.error is not None or self._plan.metric not in record.test:
            return None
        return record

    def _key(self, place: Place) -> str:
        if place not in self._keys:
            self._keys[place] = self._plan.key(self._plan.make_run(*place, Path("unused")))
        return self._keys[place]

    def _do(self, place: Place) -> None:
        name, rate, seed = place
        record = self.find(place)
        note = "from an earlier call"
        if record is None:
            if name not in self._arms or time.monotonic() >= self._end:
                self.has_skipped = True
                return
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
        measured, error = Measured(), None
        with tempfile.TemporaryDirectory(prefix="pacatune-study-") as scratch:
            run = self._plan.make_run(name, rate, seed, Path(scratch))
            try:
                found = self._plan.task.run(run, Console(quiet=True))
                _refuse_not_finite({"train_loss": found.train_loss, **found.validation})
                _refuse_not_finite({**found.test, **found.forgetting})
                measured = found
            except Exception as failure:  # whatever it is, the other runs go on
                error = f"{type(failure).__name__}: {' '.join(str(failure).split())}"
        return RunRecord(
            **{f.name: getattr(measured, f.name) for f in dataclasses.fields(Measured)},
            key=self._key(place),
            arm=name,
            learning_rate=rate,
            seed=seed,
            seconds=time.perf_counter() - start,
            versions=versions(*_PACKAGES),
            error=error,
        )


def _refuse_not_finite(values: dict[str, float | None]) -> None:
    for name, value in values.items():
        if value is not None and not math.isfinite(value):
            raise FloatingPointError(f"{name} is {value}: training diverged; lower the rate.")


def _best_rate(plan: Plan, ended: Ended, name: str) -> float | None:
    """Return the rate with the best mean on validation data over the seeds that choose."""
    return best_of(_rate_curve(plan, ended, name), higher_is_better=plan.higher_is_better)


def _rate_curve(plan: Plan, ended: Ended, name: str) -> dict[float, float | None]:
    """Return learning rate -> mean metric on validation data, None where a run failed."""
    seeds = plan.config.seeds[: plan.config.tuning_seeds]
    curve: dict[float, float | None] = {}
    for rate in plan.arms[name].learning_rates:
        records = [record for seed in seeds if (record := ended.get((name, rate, seed)))]
        is_whole = len(records) == len(seeds) and all(r.error is None for r in records)
        curve[rate] = mean_of([r.validation[plan.metric] for r in records]) if is_whole else None
    return curve


def _summarise(plan: Plan, ended: Ended) -> StudyResult:
    """Return what each arm reached at its best rate, compared with the reference."""
    reference = str(plan.config.reference)
    compared_with = _test_values(plan, _good_runs(plan, ended, reference))
    arms = {name: _arm_result(plan, ended, name, compared_with) for name in plan.arms}
    return StudyResult(
        metric=plan.metric,
        higher_is_better=plan.higher_is_better,
        reference=reference,
        arms=arms,
        warnings=[*plan.task.warnings, *_warnings(plan, ended, arms)],
        config=dataclasses.asdict(plan.config),
        versions=versions(*_PACKAGES),
    )


def _good_runs(plan: Plan, ended: Ended, name: str) -> dict[int, RunRecord]:
    """Return seed -> run of an arm at its best rate, those that ended well."""
    rate = _best_rate(plan, ended, name)
    return {
        seed: record
        for (arm, at, seed), record in sorted(ended.items(), key=lambda item: item[0][2])
        if (arm, at) == (name, rate) and record.error is None
    }


def _test_values(plan: Plan, runs: dict[int, RunRecord]) -> dict[int, float]:
    return {seed: record.test[plan.metric] for seed, record in runs.items()}


def _arm_result(plan: Plan, ended: Ended, name: str, reference: dict[int, float]) -> ArmResult:
    planned, rate = plan.arms[name], _best_rate(plan, ended, name)
    runs = _good_runs(plan, ended, name)
    values = _test_values(plan, runs)
    rises = [r.forgetting["after"] - r.forgetting["before"] for r in runs.values() if r.forgetting]
    return ArmResult(
        name=name,
        method=planned.arm.method,
        rank=planned.rank,
        learning_rate=rate,
        values=values,
        mean=mean_of(list(values.values())),
        std=std_of(list(values.values())),
        # Ranks that gradients decide about are known when a run has ended.
        num_trainable_parameters=max(
            (record.num_trainable_parameters for record in runs.values()),
            default=planned.num_trainable_parameters,
        ),
        forgetting=mean_of(rises),
        rates=_rate_curve(plan, ended, name),
        at_edge=is_at_edge(rate, planned.learning_rates),
        step_ms=median_of([run.step_ms for run in runs.values()]),
        saved_activation_bytes=median_of([run.saved_activation_bytes for run in runs.values()]),
        comparison=None if name == plan.config.reference else compare(values, reference),
        failures=[
            f"rate {at:g}, seed {seed}: {record.error}"
            for (arm, at, seed), record in ended.items()
            if arm == name and record.error is not None
        ],
    )


def _warnings(plan: Plan, ended: Ended, arms: dict[str, ArmResult]) -> list[str]:
    found = [
        f"{name}: the best rate ({arm.learning_rate:g}) is at the edge of its grid "
        f"({', '.join(f'{rate:g}' for rate in arm.rates)}); a better one may lie outside."
        for name, arm in arms.items()
        if arm.at_edge
    ]
    for name, arm in arms.items():
        if arm.failures:
            found.append(f"{name}: {len(arm.failures)} runs failed; the next call tries again.")
        if arm.learning_rate is None and arm.failures:
            found.append(f"{name}: no rate of the grid worked, so there is no result.")
    if plan.config.match == "parameters":
        wanted = arms[str(plan.config.reference)].num_trainable_parameters
        found += [
            f"{name}: trains {arm.num_trainable_parameters:,} parameters, the reference {wanted:,}."
            for name, arm in arms.items()
            if abs(arm.num_trainable_parameters - wanted) > _EQUAL_SHARE * wanted
        ]
    if len({tuple(sorted(record.versions.items())) for record in ended.values()}) > 1:
        found.append("the runs were done with different versions of packages; see runs/.")
    return found
