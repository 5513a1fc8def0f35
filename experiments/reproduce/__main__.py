"""Put what is found here beside a table or figure of the paper.

    python -m experiments.reproduce --list
    python -m experiments.reproduce table5 --output DIR
    python -m experiments.reproduce all --output DIR

Two cores are enough; real small models are downloaded as `python -m examples.packaged` does. A
result is kept once it is computed: the same command again goes on, and another name adds to the
folder. The exit status is 1 if something failed; the page says what.
"""

import argparse
import sys
import warnings
from functools import partial
from pathlib import Path

from rich.console import Console

from experiments.jobs import done
from experiments.moslora import add_method
from experiments.reproduce.catalogue import EXPERIMENTS
from experiments.reproduce.experiment import Experiment, comparison, make_page, write_results
from pacatune.cli.options import quiet_libraries
from pacatune.files.owned_folder import OURS, OwnedFolder
from pacatune.names import choose
from pacatune.reports.provenance import commit

ALL = "all"
_PACKAGES = ("trl", "bitsandbytes", "timm")
_CODE = partial(commit, Path(__file__).parents[2], "src", "experiments", "examples")


def main(argv: list[str] | None = None) -> int:
    """Read the command line, compute what is missing, write the pages."""
    add_method()
    parser = argparse.ArgumentParser(
        prog="python -m experiments.reproduce",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "name", nargs="?", metavar="NAME", help="table1 ... table7, fig2, fig3; all"
    )
    parser.add_argument("--list", action="store_true", help="list names, with their number of jobs")
    parser.add_argument("--output", type=Path, metavar="DIR", help="gets the pages and results")
    options = parser.parse_args(argv)
    console = Console(markup=False, highlight=False, soft_wrap=True)
    if options.list:
        for name, one in EXPERIMENTS.items():
            about = f"{one.paper.title} ({one.paper.place})"
            console.print(f"{name:<7} {len(one.jobs()):>3} jobs  {about}")
        return 0
    if not options.name or options.output is None:
        parser.error("give a NAME and --output DIR (--list shows the names)")
    try:
        name = choose(options.name, [*EXPERIMENTS, ALL], option="NAME")
        chosen = [*EXPERIMENTS.values()] if name == ALL else [EXPERIMENTS[name]]
        _check(options.output)
        return sum([_reproduce(one, options.output, console) for one in chosen]) and 1
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        console.print("Stopped; the same command goes on.")
        return 130


def _check(output: Path) -> None:
    """Refuse what would mix folders."""
    if output.is_file():
        raise FileExistsError(f"{output} is a file; choose a folder: --output DIR.")
    if (output / OURS).exists():
        raise FileExistsError(
            f"{output} holds the results of another command, or of one table; choose another "
            "folder, or the one around it: --output DIR."
        )


def _reproduce(experiment: Experiment, output: Path, console: Console) -> int:
    """Do the jobs that are missing, and write the page; return how many failed."""
    folder = OwnedFolder(path=output / f"{experiment.paper.name}-small", kind="a reproduction")
    console.print(experiment.paper.title)
    page = f"{experiment.paper.name}.md"
    with folder.going_on("*.md", "results.json"):
        jobs = experiment.jobs()
        found = done(jobs, folder, tell=console.print, packages=_PACKAGES, code=_CODE)
        folder.write(page, make_page(experiment, found))
        write_results(found, folder)
    compared = comparison(experiment, [row for one in found.values() for row in one.rows])
    for line in compared.plain() if compared is not None else ():
        console.print(line)
    console.print(f"The page is {folder.path / page}.\n")
    return sum(one.error is not None for one in found.values())


if __name__ == "__main__":
    quiet_libraries()
    # Deprecations between the packages that we build on.
    warnings.filterwarnings("ignore", category=FutureWarning)
    sys.exit(main())
