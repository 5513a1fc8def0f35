"""Make every page and picture of the committed results, in a folder that git ignores.

python -m benchmarks.pages          # make report

report/reproduce-small/all.html     the paper and here, with pictures; .md and .svg beside it
report/reproduce-simulate/all.html  the same, of memory alone
report/studies/NAME/report.md       each study, with its two plots
report/bench-NAME/bench.md          each `pacatune bench`, with its pictures
"""

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.collect import RESULTS, STUDIES
from pacatune.files.owned_folder import OwnedFolder

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "report"


def make_pages(folder: Path, results: Path = RESULTS) -> Iterator[Path]:
    """Write the pages, and yield the first file of each to look at."""
    for path in sorted(results.glob("reproduce-*.json")):
        yield _reproduction(path.stem.removeprefix("reproduce-"), folder / path.stem, results)
    for path in sorted(results.glob("bench-*.json")):
        yield _bench(_read(path), folder / path.stem)
    if (results / f"{STUDIES}.json").is_file():
        for name, study in _read(results / f"{STUDIES}.json").items():
            yield _study(study, folder / "studies" / name)


def read_sections(mode: str, results: Path = RESULTS) -> list[Any]:
    """Return the report's sections on a committed reproduction."""
    from pacatune.experiments.reproduce import EXPERIMENTS
    from pacatune.experiments.reproduce.running import make_section

    values = _read(results / f"reproduce-{mode}.json")
    return [
        make_section(EXPERIMENTS[name], mode, cells, values["command"])  # type: ignore[arg-type]
        for name, cells in values["cells"].items()
    ]


def _reproduction(mode: str, folder: Path, results: Path) -> Path:
    from pacatune.experiments.reproduce.running import write_report

    output = _ready(folder)
    write_report(read_sections(mode, results), "all", "The paper and here", output)
    return folder / "all.html"


def _bench(result: dict[str, Any], folder: Path) -> Path:
    from pacatune.measure.pictures import save_pictures
    from pacatune.measure.report import make_report

    output = _ready(folder)
    with output.staged() as staging:
        pictures = save_pictures(result, staging)
    output.write("bench.md", make_report(result, pictures))
    return folder / "bench.md"


def _study(values: dict[str, Any], folder: Path) -> Path:
    from pacatune.study.report import REPORT_NAME, write_report
    from pacatune.study.result import StudyResult

    write_report(StudyResult.from_dict(values), _ready(folder))
    return folder / REPORT_NAME


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
