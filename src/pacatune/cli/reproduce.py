"""`pacatune reproduce`: the paper's tables and figures, beside what is found here."""

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pacatune.cli.options import build, give_one, parser_of, quiet_libraries

# Some cells have no result; the report says which and why.
EXIT_FAILURES = 1


@dataclass(frozen=True, kw_only=True)
class Options:
    """Put what is found here beside the paper's tables and figures.

    The report is Markdown, HTML and JSON.
    """

    name: str = ""
    list: bool = False
    """List the names, and stop."""
    scale: Literal["small", "full"] | None = None
    """small: real small models on this machine, offline; full: the paper's, on a GPU."""
    simulate: bool = False
    """The memory columns alone, at the paper's own sizes, without GPU or weights."""
    print: bool = False
    """Show the settings beside the paper's (of --scale, by default full), and stop."""
    only: str | None = None
    """One method alone, such as paca; other results are kept."""
    output: str = ""
    """Gets the report and the results."""
    resume: bool = False
    """Go on with what an earlier run left in DIR."""


def run(argv: list[str]) -> int:
    """Run `pacatune reproduce` with the words after it; return the exit status."""
    parser = parser_of("reproduce", Options, "name")
    parser.add_argument("name", nargs="?", default="", help="table1 ... table7, fig2, fig3, or all")
    options = build(Options, parser.parse_args(argv))
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
    if not options.name:
        raise ValueError("give a NAME (`pacatune reproduce --list` shows them).")
    experiments = find_experiments(options.name, EXPERIMENTS)
    if options.only is not None:
        check_method(options.only, experiments)
    if options.print:
        for one in experiments:
            console.print(settings_text(one, options.scale or "full"))
        return 0
    give_one(scale=options.scale, simulate=options.simulate, needed=True)
    if not options.output:
        raise ValueError("give --output DIR for the report.")
    sections = _run(
        options, experiments, shlex.join(["pacatune", "reproduce", *argv]), console.print
    )
    for section in sections:
        console.print(Markdown(make_result(section)))
    if sections:
        console.print(f"\nThe report is {Path(options.output, f'{options.name}.html')}.")
    return EXIT_FAILURES if any(section.failures for section in sections) else 0


def _run(options: Options, experiments: list[Any], command: str, say: Any) -> list[Any]:
    from pacatune.experiments.reproduce import open_folder, run_experiments
    from pacatune.experiments.reproduce.running import result_folder, write_report

    mode: Any = options.scale or "simulate"
    if len(experiments) == 1 and mode in experiments[0].cannot:
        raise ValueError(f"{experiments[0].name}: {experiments[0].cannot[mode]}")
    folder = Path(options.output)
    with open_folder(folder, resume=options.resume):
        sections = run_experiments(experiments, mode, folder, command, say, options.only)
        if options.name == "all":
            write_report(sections, "all", "The paper and here", result_folder(folder))
    return sections
