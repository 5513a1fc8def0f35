"""`pacatune compare`: methods on one task, each at its best learning rate, over several seeds."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pacatune.cli.options import quiet_libraries

if TYPE_CHECKING:
    from rich.console import Console

    from pacatune.study import StudyConfig

EXIT_FAILED_RUNS = 1
EXIT_PAUSED = 3


@dataclass(frozen=True, kw_only=True)
class Compare:
    """Compare methods on one task.

    Each arm's learning rate is chosen on held-out training data, then all seeds are reported on
    test data. A folder that holds runs of the study is continued; failed runs are done again. Exit
    status: 0 finished, 1 runs failed, 3 runs are left because of --max_hours or --arms.
    """

    config: Path
    """The study, a YAML file."""
    output: Path
    """Output folder of runs and results."""
    max_hours: float | None = None
    """Start no run after so many hours."""
    arms: tuple[str, ...] = ()
    """Do the runs of these arms alone."""
    dry_run: bool = False
    """Show what would run, and stop."""

    def run(self, command: str) -> int:
        """Do it."""
        quiet_libraries()

        from rich.console import Console

        from pacatune.study.config import read_study

        config = read_study(self.config)

        from pacatune.study import StudyPaused, run_study
        from pacatune.study.report import table
        from pacatune.training.progress import show_warnings

        console = Console(highlight=False)
        if self.dry_run:
            _show_plan(config, self.output, console)
            return 0
        arms = list(self.arms) or None
        try:
            result = run_study(
                config, self.output, console=console, max_hours=self.max_hours, arms=arms
            )
        except StudyPaused as paused:
            console.print(str(paused), soft_wrap=True, markup=False)
            return EXIT_PAUSED
        found = table(result)
        for line in (*found.plain(), "", *found.notes):
            console.print(line, markup=False, soft_wrap=True)
        show_warnings(result.warnings, console)
        console.print(f"report and plots are in {self.output}", soft_wrap=True)
        return EXIT_FAILED_RUNS if any(arm.failures for arm in result.arms.values()) else 0


command = Compare


def _show_plan(config: "StudyConfig", folder: Path, console: "Console") -> None:
    from pacatune.reports.rows import Table
    from pacatune.study.plan import make_plan
    from pacatune.study.runner import pending_runs
    from pacatune.training.progress import show_warnings

    plan = make_plan(config)
    rows = [
        [
            name,
            arm.arm.method,
            "-" if arm.rank is None else str(arm.rank),
            f"{arm.num_trainable_parameters:,}",
            " ".join(f"{rate:g}" for rate in arm.learning_rates),
        ]
        for name, arm in plan.arms.items()
    ]
    header = ["arm", "method", "rank", "trained parameters", "rates"]
    for line in Table(header=header, cells=rows, num_index=2).plain():
        console.print(line, markup=False, soft_wrap=True)
    pending, seeds = pending_runs(plan, folder), len(config.seeds)
    num_tuning = sum(len(arm.learning_rates) for arm in plan.arms.values()) * config.tuning_seeds
    console.print(
        f"{plan.num_runs} runs: {num_tuning} choose the rates with {config.tuning_seeds} of "
        f"{seeds} seeds ({pending} of them to do), {plan.num_runs - num_tuning} more at the chosen "
        "rates.",
        soft_wrap=True,
    )
    show_warnings(plan.task.warnings, console)
