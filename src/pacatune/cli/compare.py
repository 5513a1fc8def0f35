"""`pacatune compare`: methods on one task, each at its best learning rate, over several seeds."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from pacatune.cli.options import new_parser, quiet_libraries

if TYPE_CHECKING:
    from rich.console import Console

    from pacatune.experiments.study import StudyConfig, StudyResult

EXIT_FAILED_RUNS = 1
EXIT_PAUSED = 3


def run(argv: list[str]) -> int:
    """Run `pacatune compare` with the words after it; return the exit status."""
    options = _parse(argv)
    quiet_libraries()

    from rich.console import Console

    from pacatune.experiments.study.config import read_study

    config = read_study(Path(options.config))

    from pacatune.experiments.study import StudyPaused, run_study

    console = Console(highlight=False)
    if options.dry_run:
        _show_plan(config, Path(options.output), console)
        return 0
    try:
        result = run_study(
            config,
            Path(options.output),
            console=console,
            max_hours=options.max_hours,
            arms=options.arms.split(",") if options.arms else None,
        )
    except StudyPaused as paused:
        console.print(str(paused), soft_wrap=True, markup=False)
        return EXIT_PAUSED
    _show_result(result, Path(options.output), console)
    return EXIT_FAILED_RUNS if any(arm.failures for arm in result.arms.values()) else 0


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = new_parser(
        "compare",
        "Compare methods on one task: each arm's learning rate is chosen on held-out training "
        "data, then all seeds are reported on test data. A folder that holds runs of the study is "
        "continued; failed runs are done again. Exit status: 0 finished, 1 runs failed, 3 runs are "
        "left because of --max-hours or --arms.",
    )
    add = parser.add_argument
    add("--config", required=True, metavar="STUDY.yaml", help="the study")
    add("--output", required=True, metavar="DIR", help="output folder of runs and results")
    add("--max-hours", type=float, metavar="H", help="start no run after so many hours")
    add("--arms", metavar="A,B", help="do the runs of these arms alone")
    add("--dry-run", action="store_true", help="show what would run, and stop")
    return parser.parse_args(argv)


def _show_plan(config: "StudyConfig", folder: Path, console: "Console") -> None:
    from rich.table import Table

    from pacatune.experiments.study.plan import make_plan
    from pacatune.experiments.study.runner import pending_runs
    from pacatune.training.progress import show_warnings

    plan = make_plan(config)
    shown = Table("arm", "method", "rank", "trained parameters", "rates")
    for name, arm in plan.arms.items():
        rank = "-" if arm.rank is None else str(arm.rank)
        rates = " ".join(f"{rate:g}" for rate in arm.learning_rates)
        shown.add_row(name, arm.arm.method, rank, f"{arm.num_trainable_parameters:,}", rates)
    console.print(shown)
    pending, seeds = pending_runs(plan, folder), len(config.seeds)
    num_tuning = sum(len(arm.learning_rates) for arm in plan.arms.values()) * config.tuning_seeds
    console.print(
        f"{plan.num_runs} runs: {num_tuning} choose the rates with {config.tuning_seeds} of "
        f"{seeds} seeds ({pending} of them to do), {plan.num_runs - num_tuning} more at the chosen "
        "rates.",
        soft_wrap=True,
    )
    show_warnings(plan.task.warnings, console)


def _show_result(result: "StudyResult", folder: Path, console: "Console") -> None:
    from rich.table import Table

    from pacatune.experiments.study.report import table
    from pacatune.training.progress import show_warnings

    found = table(result)
    shown = Table(*found.header)
    for row in found.rows:
        shown.add_row(*row)
    console.print(shown)
    console.print(found.note, markup=False)
    show_warnings(result.warnings, console)
    console.print(f"report and plots are in {folder}", soft_wrap=True)
