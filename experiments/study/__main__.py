"""Run a study: `python -m experiments.study STUDY.yaml --output DIR`."""

import argparse
import sys
import warnings
from pathlib import Path

from experiments.study.config import read_study
from experiments.study.runner import REPORT, run_study, table
from experiments.study.statistics import read_runs
from pacatune.cli.options import quiet_libraries


def main(words: list[str] | None = None) -> int:
    """Run what the folder does not hold yet, and print the table; 1 if runs have failed."""
    parser = argparse.ArgumentParser(prog="python -m experiments.study", description=__doc__)
    parser.add_argument("study", type=Path, help="a YAML file; experiments/study/config.py")
    parser.add_argument("--output", type=Path, required=True, help="folder of runs and report")
    known = "table of runs; those of the study named as the output folder are not done again"
    parser.add_argument("--known", type=Path, metavar="CSV", help=known)
    options = parser.parse_args(words)
    quiet_libraries()
    warnings.filterwarnings("ignore", category=FutureWarning)  # between the packages we build on
    try:
        known = read_runs(options.known).get(options.output.name) if options.known else None
        results = run_study(read_study(options.study), options.output, known=known)
    except (ValueError, TypeError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    shown = table(results)
    print(*shown.plain(), *shown.notes, f"wrote {options.output / REPORT}", sep="\n")
    return int(any(result.failures for result in results.values()))


if __name__ == "__main__":
    sys.exit(main())
