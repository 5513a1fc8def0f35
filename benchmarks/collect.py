"""Take what studies found into benchmarks/results, without pages and pictures.

    python -m benchmarks.collect FOLDER...          # -> results/STUDY.json and .csv

FOLDER is what `pacatune compare` wrote. STUDY is what its name begins with: quality, selection,
groups, cost or head. STUDY.json has what each folder's study found, STUDY.csv a line for each run.
`make report` makes the pages and pictures again.
"""

import argparse
import csv
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.results import RESULTS, write_json
from benchmarks.studies import FILES


def collect_studies(folders: Sequence[Path], results: Path = RESULTS) -> list[Path]:
    """Take studies among those that are there, in the place of earlier ones of the same name."""
    kinds = {folder: folder.name.partition("-")[0] for folder in folders}
    for folder, kind in kinds.items():
        if kind not in FILES:
            raise ValueError(
                f"`folder` ({folder}): its name must begin with {' or '.join(FILES)}, which says "
                "whose study it is; rename it."
            )
    written = [path for folder, kind in kinds.items() for path in _collect(folder, kind, results)]
    return list(dict.fromkeys(written))


def _collect(folder: Path, kind: str, results: Path) -> list[Path]:
    found, table = results / f"{kind}.json", results / f"{kind}.csv"
    studies = json.loads(found.read_text(encoding="utf-8")) if found.is_file() else {}
    rows: list[dict[str, Any]] = list(read_runs(kind, results)) if table.is_file() else []
    study = json.loads((folder / "study.json").read_text(encoding="utf-8"))
    if not study["finished"]:
        raise ValueError(f"{folder} holds no finished study; run `pacatune compare` again.")
    rows = [row for row in rows if row["study"] != folder.name] + _runs_of(folder, study)
    write_json(studies | {folder.name: study}, found)
    columns = dict.fromkeys(name for row in rows for name in row)
    with table.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [*columns], restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return [found, table]


def read_runs(kind: str, results: Path = RESULTS) -> Iterator[dict[str, str]]:
    """Yield the lines of the table of runs of one of `FILES`."""
    if not (path := results / f"{kind}.csv").is_file():
        raise FileNotFoundError(
            f"{path} is missing: no study of this name has ended; `pacatune compare` runs them, "
            "`python -m benchmarks.collect` takes them in."
        )
    with path.open(newline="", encoding="utf-8") as file:
        yield from csv.DictReader(file)


def _runs_of(folder: Path, study: Mapping[str, Any]) -> list[dict[str, Any]]:
    rows = []
    for path in sorted((folder / "jobs").glob("*.json")):
        job = json.loads(path.read_text(encoding="utf-8"))
        if "error" in job:
            continue
        training = job["inputs"]["run"]["training"]
        if job["provenance"]["versions"] != study["versions"]:
            raise ValueError(
                f"{path} ran with other versions than the study ended with; run it again in a new "
                "folder."
            )
        rows.append(
            {
                "study": folder.name,
                "arm": job["rows"][0]["method"],
                "learning rate": training["learning_rate"],
                # One that is transformers' own is not in the options.
                "seed": training.get("seed", 42),
                **{_title(row): row["value"] for row in job["rows"]},
                "seconds": job["provenance"]["seconds"],
                "key": job["key"],
            }
        )
    arms = [*study["arms"], *(row["arm"] for row in rows)]  # first those of its last stage
    rows.sort(key=lambda one: (arms.index(one["arm"]), one["learning rate"], one["seed"]))
    return rows


def _title(row: Mapping[str, Any]) -> str:
    return ", ".join(filter(None, (row["what"], row.get("unit"))))


def main(argv: list[str] | None = None) -> None:
    """Read the command line and collect."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folders", type=Path, nargs="+")
    for path in collect_studies(parser.parse_args(argv).folders):
        print(f"wrote {path}")


if __name__ == "__main__":
    sys.exit(main())
