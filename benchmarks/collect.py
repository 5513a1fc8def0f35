"""Take what a command found into benchmarks/results, as one file without pages and pictures.

    python -m benchmarks.collect bench FOLDER NAME        # -> results/bench-NAME.json
    python -m benchmarks.collect study FOLDER...          # -> results/STUDY.json and .csv

FOLDER is what `pacatune bench` or `compare` wrote. STUDY is what its name begins with: selection or
quality. `make report` makes the pages and pictures again.
"""

import argparse
import csv
import json
import shutil
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.results import RESULTS, write_json

STUDIES = "selection"
"""Name of the two files of a study: .json, what each of its parts found, and .csv, a line for each
run. The folders of the parts begin with it."""
QUALITY = "quality"
"""The same of another study."""
COLUMNS = (
    "study",
    "arm",
    "learning_rate",
    "seed",
    "validation_accuracy",
    "validation_loss",
    "validation_exact_match",
    "test_accuracy",
    "test_loss",
    "test_exact_match",
    "forgetting_before",
    "forgetting_after",
    "num_trainable_parameters",
    "train_loss",
    "num_steps",
    "step_ms",
    "saved_activation_bytes",
    "seconds",
    "error",
    "key",
)
# Numbers of a run -> columns, where they are called otherwise.
_COLUMN_OF = {
    "general loss before": "forgetting_before",
    "general loss after": "forgetting_after",
    "trained parameters": "num_trainable_parameters",
    "steps": "num_steps",
    "step": "step_ms",
    "kept for backward": "saved_activation_bytes",
}


def collect_bench(folder: Path, name: str, results: Path = RESULTS) -> Path:
    """Copy the numbers of one `pacatune bench`; return the file."""
    path = results / f"bench-{name}.json"
    shutil.copyfile(folder / "bench.json", path)
    return path


def collect_studies(folders: Sequence[Path], results: Path = RESULTS) -> list[Path]:
    """Take studies among those that are there, in the place of earlier ones of the same name."""
    written = []
    for name in (STUDIES, QUALITY):
        some = [folder for folder in folders if _study_of(folder) == name]
        written += _collect(some, name, results) if some else []
    return written


def _study_of(folder: Path) -> str:
    return QUALITY if folder.name.startswith(f"{QUALITY}-") else STUDIES


def _collect(folders: Sequence[Path], name: str, results: Path) -> list[Path]:
    found, table = results / f"{name}.json", results / f"{name}.csv"
    studies = json.loads(found.read_text(encoding="utf-8")) if found.is_file() else {}
    rows = list(read_runs(results, name)) if table.is_file() else []
    for folder in folders:
        study = json.loads((folder / "study.json").read_text(encoding="utf-8"))
        if not study["finished"]:
            raise ValueError(f"{folder} holds no finished study; run `pacatune compare` again.")
        studies[folder.name] = study
        rows = [row for row in rows if row["study"] != folder.name]
        rows += _runs_of(folder, study)
    write_json(studies, found)
    with table.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return [found, table]


def read_runs(results: Path = RESULTS, name: str = STUDIES) -> Iterable[dict[str, str]]:
    """Yield the lines of the table of runs."""
    with (results / f"{name}.csv").open(newline="", encoding="utf-8") as file:
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
        numbers = {row["what"]: row["value"] for row in job["rows"]}
        row = {_COLUMN_OF.get(w, w.replace(" ", "_")): value for w, value in numbers.items()}
        # A seed that is transformers' own is not in the options.
        row |= {"learning_rate": training["learning_rate"], "seed": training.get("seed", 42)}
        row |= {"study": folder.name, "arm": job["rows"][0]["method"], "key": job["key"]}
        rows.append(row | {"seconds": job["provenance"]["seconds"]})
    arms = list(study["arms"])
    rows.sort(key=lambda one: (arms.index(one["arm"]), one["learning_rate"], one["seed"]))
    return rows


def main(argv: list[str] | None = None) -> None:
    """Read the command line and collect."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    kinds = parser.add_subparsers(dest="kind", required=True)
    bench = kinds.add_parser("bench")
    bench.add_argument("folder", type=Path)
    bench.add_argument("name", help="such as the device")
    kinds.add_parser("study").add_argument("folders", type=Path, nargs="+")
    options = parser.parse_args(argv)
    if options.kind == "study":
        paths = collect_studies(options.folders)
    else:
        paths = [collect_bench(options.folder, options.name)]
    for path in paths:
        print(f"wrote {path}")


if __name__ == "__main__":
    sys.exit(main())
