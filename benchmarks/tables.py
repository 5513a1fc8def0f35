"""Write the tables of measurements into README and docs from the committed results.

    python -m benchmarks.tables

A block `<!-- table: NAME -->` is filled from benchmarks/results/NAME.json, which holds

    {"command", "device", "versions", "commit", "is_modified", "seed", "model",
     "methods": {"lora": "PEFT's LoRA, r = 8", ...},
     "rows": [{"setting": "512 tokens, float32", "method": "lora", "step_ms": 1.0}, ...]}

with one row per setting and method, `step_ms` being the median. The table has a line per setting
and, per method, the time of its step; then what PaCA's takes as a share of it. The blocks
`estimate-1`, `-3` and `-4` are made of `estimate.json` (estimate_tables.py).
"""

import json
import sys
from pathlib import Path
from typing import Any

from benchmarks import estimate_tables
from tools.doc_block import rewrite

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
OURS = "paca"


def table(name: str, results: Path = RESULTS) -> str:
    """Return the Markdown table of one result, and where it comes from.

    Args:
        name: Of the file, without `.json`; or `estimate-` and the number of the paper's table.
        results: Folder.

    Raises:
        ValueError: If a setting lacks one of the methods.
    """
    if name.startswith("estimate-"):
        return estimate_tables.table(name.removeprefix("estimate-"), results)
    path = results / f"{name}.json"
    if not path.is_file():
        return f"Not measured yet: `make bench` writes `benchmarks/results/{name}.json`."
    result = json.loads(path.read_text(encoding="utf-8"))
    times = _by_setting(result["rows"])
    methods = list(next(iter(times.values())))
    lines = [
        f"| step, ms (PaCA's share) | {' | '.join(methods)} |",
        "|---|" + "--:|" * len(methods),
    ]
    for setting, row in times.items():
        if set(row) != set(methods):
            raise ValueError(
                f"{path}: {setting!r} has {sorted(row)}, another setting {sorted(methods)}; "
                "measure all methods in all settings."
            )
        lines.append(f"| {setting} | {' | '.join(_cell(row, method) for method in methods)} |")
    meanings = [f"`{method}`: {result['methods'][method]}" for method in methods]
    return "\n".join([*lines, "", "; ".join(meanings) + ".", "", _source(name, result)])


def _by_setting(rows: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Return setting -> method -> milliseconds, in the order of the file."""
    times: dict[str, dict[str, float]] = {}
    for row in rows:
        times.setdefault(row["setting"], {})[row["method"]] = row["step_ms"]
    return times


def _cell(row: dict[str, float], method: str) -> str:
    text = f"{row[method]:.4g}"
    return text if method == OURS else f"{text} ({row[OURS] / row[method]:.2f})"


def _source(name: str, result: dict[str, Any]) -> str:
    versions = ", ".join(f"{package} {number}" for package, number in result["versions"].items())
    changes = ", with changes that were not committed," if result["is_modified"] else ""
    return (
        f"{result['model']}; medians of whole steps, all methods alternating in one run, seed "
        f"{result['seed']}, on {result['device']} ({versions}). `{result['command']}` at commit "
        f"{result['commit'][:9]}{changes} wrote `benchmarks/results/{name}.json`."
    )


def main() -> None:
    """Rewrite the documents."""
    for path in rewrite(DOCUMENTS, "table", table):
        print(f"wrote {path}")


if __name__ == "__main__":
    sys.exit(main())
