"""Make every page and picture of the committed results, in a folder that git ignores.

python -m benchmarks.pages          # make report

report/reproduce/NAME.md            a table or figure of the paper and ours, with a picture
report/studies/NAME/report.md       each study, with its plots
"""

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.results import RESULTS, ROOT
from benchmarks.studies import FILES
from experiments.reproduce.catalogue import EXPERIMENTS
from experiments.reproduce.experiment import read_results, write_page
from pacatune.files.owned_folder import OwnedFolder

FOLDER = ROOT / "report"


def make_pages(folder: Path) -> Iterator[Path]:
    """Write the pages, and yield the first file of each to look at."""
    from pacatune.study.report import REPORT_NAME, write_report
    from pacatune.study.result import StudyResult

    reproduction = _ready(folder / "reproduce")
    for name, one in EXPERIMENTS.items():
        if found := read_results(name, "small"):
            yield write_page(one, found, "small", reproduction)
    for path in filter(Path.is_file, (RESULTS / f"{kind}.json" for kind in FILES)):
        for name, study in _read(path).items():
            output = folder / "studies" / name
            write_report(StudyResult.from_dict(study), _ready(output))
            yield output / REPORT_NAME


def _ready(folder: Path) -> OwnedFolder:
    output = OwnedFolder(path=folder, kind="pages of results")
    output.start_anew()
    return output


def _read(path: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return values


def main(argv: list[str] | None = None) -> None:
    """Read the command line, and say where the pages are."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=FOLDER, help="default: report/")
    for path in make_pages(parser.parse_args(argv).output):
        print(f"wrote {path}")


if __name__ == "__main__":
    sys.exit(main())
