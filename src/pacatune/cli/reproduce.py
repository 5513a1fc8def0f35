"""`pacatune reproduce`: the paper's tables and figures, beside what is found here."""

import argparse
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from pacatune.cli.options import new_parser, quiet_libraries

if TYPE_CHECKING:
    from rich.console import Console

    from pacatune.experiments.reproduce import Experiment
    from pacatune.experiments.reproduce.experiment import Mode, Section

# Some cells have no result; the report says which and why.
EXIT_FAILURES = 1


def run(argv: list[str]) -> int:
    """Run `pacatune reproduce` with the words after it; return the exit status."""
    options = _parse(argv)
    quiet_libraries()

    from rich.console import Console
    from rich.markdown import Markdown

    from pacatune.experiments.reproduce import EXPERIMENTS, find_experiments
    from pacatune.experiments.reproduce.page import make_result
    from pacatune.experiments.reproduce.running import check_method
    from pacatune.experiments.reproduce.settings import settings_text

    console = Console(markup=False, highlight=False, soft_wrap=True)
    if options.list:
        for one in EXPERIMENTS.values():
            console.print(f"{one.name:<7} {one.title} ({one.place})")
        return 0
    experiments = find_experiments(options.name, EXPERIMENTS)
    if options.only is not None:
        check_method(options.only, experiments)
    if options.print:
        for one in experiments:
            console.print(settings_text(one, options.scale or "full"))
        return 0
    command = " ".join(["pacatune reproduce", *map(shlex.quote, argv)])
    sections = _run(options, experiments, command, console)
    for section in sections:
        console.print(Markdown(make_result(section)))
    if sections:
        console.print(f"\nThe report is {Path(options.output) / f'{options.name}.html'}.")
    return EXIT_FAILURES if any(section.failures for section in sections) else 0


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = new_parser(
        "reproduce",
        "Put what is found here beside the paper's tables and figures, in Markdown, HTML and JSON.",
    )
    add = parser.add_argument
    add("name", nargs="?", metavar="NAME", help="table1 ... table7, fig2, fig3, or all")
    add("--list", action="store_true", help="list the names, and stop")
    shown = "show the settings beside the paper's (of --scale, default full), and stop"
    simulated = "the memory columns alone, at the paper's own sizes, without GPU or weights"
    scale = "small: real small models on this machine, offline; full: the paper's, on a GPU"
    add("--scale", choices=("small", "full"), help=scale)
    add("--simulate", action="store_true", help=simulated)
    add("--print", action="store_true", help=shown)
    add("--only", metavar="METHOD", help="one method alone, such as paca; other results are kept")
    add("--output", metavar="DIR", help="gets the report and the results")
    add("--resume", action="store_true", help="go on with what an earlier run left in DIR")
    options = parser.parse_args(argv)
    if options.list:
        return options
    if options.name is None:
        parser.error("give a NAME (`pacatune reproduce --list` shows them)")
    if options.print:
        return options
    if options.simulate == (options.scale is not None):
        parser.error("give one of --scale small, --scale full and --simulate")
    if options.output is None:
        parser.error("give --output DIR for the report")
    return options


def _run(
    options: argparse.Namespace, experiments: "list[Experiment]", command: str, console: "Console"
) -> "list[Section]":
    from pacatune.experiments.reproduce import open_folder, run_experiments
    from pacatune.experiments.reproduce.running import result_folder, write_report

    mode: Mode = "simulate" if options.simulate else options.scale
    if len(experiments) == 1 and mode in experiments[0].cannot:
        raise ValueError(f"{experiments[0].name}: {experiments[0].cannot[mode]}")
    folder = Path(options.output)
    with open_folder(folder, resume=options.resume):
        sections = run_experiments(experiments, mode, folder, command, console.print, options.only)
        if options.name == "all":
            write_report(sections, "all", "The paper and here", result_folder(folder))
    return sections
