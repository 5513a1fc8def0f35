"""Take the runs of studies into benchmarks/results.

    python -m benchmarks.collect FOLDER...          # -> results/STUDY.csv, a line for each run

FOLDER is what `pacatune compare` wrote. STUDY is what its name begins with: selection, cost or
head. `benchmarks.verdict` says what cost and selection found.
"""

import argparse
import csv
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.results import RESULTS

FILES = ("selection", "cost", "head")


def collect_studies(folders: Sequence[Path], results: Path = RESULTS) -> list[Path]:
    """Take studies among those that are there, in the place of earlier ones of the same name."""
    kinds = {folder: folder.name.partition("-")[0] for folder in folders}
    for folder, kind in kinds.items():
        if kind not in FILES:
            raise ValueError(
                f"`folder` ({folder}): its name must begin with {' or '.join(FILES)}, which says "
                "whose study it is; rename it."
            )
    written = [_collect(folder, kind, results) for folder, kind in kinds.items()]
    return list(dict.fromkeys(written))


def _collect(folder: Path, kind: str, results: Path) -> Path:
    table = results / f"{kind}.csv"
    rows: list[dict[str, Any]] = list(read_runs(kind, results)) if table.is_file() else []
    study = json.loads((folder / "study.json").read_text(encoding="utf-8"))
    if not study["finished"]:
        raise ValueError(f"{folder} holds no finished study; run `pacatune compare` again.")
    rows = [row for row in rows if row["study"] != folder.name] + _runs_of(folder, study)
    columns = dict.fromkeys(name for row in rows for name in row)
    results.mkdir(parents=True, exist_ok=True)
    with table.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [*columns], restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return table


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
    rows: dict[Any, dict[str, Any]] = {}
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
        row = {
            "study": folder.name,
            "arm": job["rows"][0]["method"],
            "learning rate": training["learning_rate"],
            # One that is transformers' own is not in the options.
            "seed": training.get("seed", 42),
            **{_title(row): row["value"] for row in job["rows"]},
            "seconds": job["provenance"]["seconds"],
            "key": job["key"],
        }
        place = row["arm"], row["learning rate"], row["seed"]
        if len(row) > len(rows.get(place, ())):  # of equal runs that which measured more
            rows[place] = row
    # First the arms of its last stage.
    arms = [*study["arms"], *(row["arm"] for row in rows.values())]
    return [rows[place] for place in sorted(rows, key=lambda p: (arms.index(p[0]), *p[1:]))]


def _title(row: Mapping[str, Any]) -> str:
    return ", ".join(filter(None, (row["what"], row.get("unit"))))


def main(argv: list[str] | None = None) -> None:
    """Read the command line and collect."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folders", type=Path, nargs="+")
    try:
        for path in collect_studies(parser.parse_args(argv).folders):
            print(f"wrote {path}")
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"collect: {error}")


if __name__ == "__main__":
    sys.exit(main())
