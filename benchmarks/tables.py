"""Write the tables of measurements into README and docs from the committed results.

    python -m benchmarks.tables

A block `<!-- table: NAME -->` is filled from benchmarks/results/NAME.json, which holds

    {"command", "device", "versions", "commit", "is_modified", "seed", "model",
     "methods": {"lora": "PEFT's LoRA, r = 8", ...},
     "rows": [{"setting": "512 tokens, float32", "method": "lora", "step_ms": 1.0}, ...]}

with one row per setting and method, `step_ms` being the median. The table has a line per setting
and, per method, the time of its step; then what PaCA's takes as a share of it. The blocks
`estimate-1`, `-3` and `-4` are made of `estimate.json` (estimate_tables.py), `reproduce-outcomes`
and `-shares` of `reproduce-small.json` (reproduce_tables.py), `selection-...` of `selection.json`
(selection_tables.py), `quality-...` of `quality.json` (quality_tables.py), `lean-...` and `lengths`
of theirs (lean_tables.py), `compat` of what `make compat` has counted, `kernels` and `kernels-more`
of what benchmarks/kernels.py has, `patch` and `sync` of what benchmarks/patch.py and sync.py have
measured, `demo-rl` of what a demo of GRPO has, `distance` of what `step.json` says of PaCA's
distance to the frozen model.
"""

import json
import sys
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import (
    distance,
    estimate_tables,
    lean_tables,
    quality_tables,
    reproduce_tables,
    selection_tables,
)
from pacatune.reports.provenance import commit_text, versions_text
from pacatune.reports.tables import table_lines
from tools.doc_block import rewrite

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
OURS = "paca"
_MOST = 10  # a larger multiple says nothing


def table(name: str, results: Path = RESULTS) -> str:
    """Return the Markdown table of a result (a file's name, or estimate-1, ...), and its source."""
    if name.startswith("estimate-"):
        return estimate_tables.table(name.removeprefix("estimate-"), results)
    if name.startswith("reproduce-"):
        return reproduce_tables.table(name.removeprefix("reproduce-"), results)
    if name.startswith("selection-"):
        return selection_tables.table(results)
    if name.startswith("quality-"):
        return quality_tables.table(name.removeprefix("quality-"), results)
    if name in lean_tables.NAMES:
        return lean_tables.table(name, results)
    if name == "distance":
        return distance_table(results)
    result = _read(name.removesuffix("-more"), results)
    if result is None:
        return _missing(name)
    if name in _OF_THEIR_OWN:
        return _OF_THEIR_OWN[name](result)
    times = _by_setting((row["setting"], row["method"], row["step_ms"]) for row in result["rows"])
    methods = list(next(iter(times.values())))
    meanings = [f"`{method}`: {result['methods'][method]}" for method in methods]
    is_estimated = result.get("origin") == "roofline"
    lines = _lines("estimated step, ms" if is_estimated else "step, ms", times, name)
    source = _source_of_estimates(name, result) if is_estimated else _source(name, result)
    return "\n".join([*lines, "", "; ".join(meanings) + ".", "", source])


def compat_table(result: dict[str, dict[str, Any]]) -> str:
    """Return the Markdown table of what passed beside which releases."""
    shown = ("torch", "transformers", "peft", "accelerate")
    titles_of = _COMBINATIONS | {name: name for name in result if name not in _COMBINATIONS}
    rows = [
        [
            title,
            *(result[name]["versions"][package].partition("+")[0] for package in shown),
            *(_passed(result[name].get(half)) for half in ("core", "conformance")),
        ]
        for name, title in titles_of.items()
        if name in result
    ]
    titles = ["", "torch", "transformers", "PEFT", "accelerate", "core's tests", "PEFT's own tests"]
    remark = "`python tools/compat.py --json benchmarks/results/compat.json` counted them."
    return "\n".join([*table_lines(titles, rows), "", remark])


def _passed(counts: dict[str, int] | None) -> str:
    if not counts:
        return "not run"
    failed = f", {counts['failed']} failed" if counts["failed"] else ""
    return f"{counts['passed']:,} passed{failed}, {counts['skipped']:,} skipped"


_COMBINATIONS = {
    "floors": "the floors",
    "llama-factory": "as LLaMA-Factory pins them",
    "axolotl": "as Axolotl pins them",
    "ms-swift": "as ms-swift pins them",
}


def kernel_table(result: dict[str, Any], *, is_short: bool) -> str:
    """Return a Markdown table of kernels per decoder layer, and how many are beyond frozen.

    The short one is of training without and with torch.compile, the other of what else is counted.
    """
    eager = {row["method"]: row for row in result["rows"] if not row["is_lean"]}
    lean = {row["method"]: row for row in result["rows"] if row["is_lean"]}
    compiled = {row["method"]: row for row in result["compiled"]}
    sharded = {row["method"]: row for row in result["sharded"]}
    columns = [
        ("forward", eager, "forward"),
        ("backward", eager, "backward"),
        ("with accumulation", eager, "accumulating"),
        ("compiled: forward", compiled, "forward"),
        ("compiled: backward", compiled, "backward"),
    ]
    if not is_short:
        columns = [
            ("lean: forward", lean, "forward"),
            ("lean: backward", lean, "backward"),
            ("sharded: forward", sharded, "forward"),
            ("sharded: backward", sharded, "backward"),
            ("whole-tensor passes: forward", eager, "passes_forward"),
            ("whole-tensor passes: backward", eager, "passes_backward"),
        ]

    def cell(method: str, rows: dict[str, Any], name: str) -> str:
        if method not in rows:
            return ""
        number, floor = rows[method][name], rows["frozen"][name]
        return str(number) if method == "frozen" else f"{number} (+{number - floor})"

    lines = [[method, *(cell(method, *column[1:]) for column in columns)] for method in eager]
    table = table_lines(["kernels (beyond frozen)", *(column[0] for column in columns)], lines)
    if not is_short:
        return "\n".join(table)
    meanings = "; ".join(f"`{method}`: {result['methods'][method]}" for method in eager)
    source = (
        f"Per Llama decoder layer, weights in {result['dtype']}, adapters in "
        f"{result['adapter_dtype']}, alpha / r = {result['scaling']}: counted, not timed, on a CPU "
        f"that takes a GPU's branches ({versions_text(result['versions'])}). "
        f"`{result['command']}`{commit_text(result)} wrote `benchmarks/results/kernels.json`."
    )
    return "\n".join([*table, "", meanings + ".", "", source])


def _megabytes(num_bytes: float) -> str:
    return f"{num_bytes / 1e6:,.3g} MB" if num_bytes < 1e9 else f"{num_bytes / 1e9:.3g} GB"


def _duration(seconds: float) -> str:
    return f"{1e3 * seconds:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"


def sync_table(result: dict[str, Any]) -> str:
    """Return the Markdown table of what each method sends, with sizes of larger models."""
    models = list(dict.fromkeys(row["model"] for row in result["computed"]))
    sizes = {(row["model"], row["method"]): row["bytes"] for row in result["computed"]}
    lines = [
        [
            result["methods"][row["method"]],
            _megabytes(row["bytes"]),
            _duration(row["seconds"]) if "seconds" in row else "",
            *(_megabytes(sizes[model, row["method"]]) for model in models),
        ]
        for row in result["rows"]
    ]
    rows = {row["method"]: row for row in result["rows"]}
    drift = {row["method"]: row for row in result["drift"]}
    share = 100 * drift["lora"]["changed_elements"] / drift["lora"]["num_elements"]
    rate = result["settings"]["learning_rate"]
    remark = (
        f"A step of full training (AdamW, {rate:g}) changed {100 * result['changed_share']:.2g} % "
        "of the elements; the sizes of larger models are counted from their shapes, with that "
        f"share. PaCA's positions, once: {rows['paca']['positions_bytes'] / 1e3:.3g} kB. After "
        f"{drift['lora']['cycles']:,} merges and unmerges of one layer, with steps between, LoRA's "
        f"base differs in {share:.0f} % of its elements, by {drift['lora']['drift_of_mean']:.2g} "
        f"of their mean size; PaCA's in {drift['paca']['changed_elements']}."
    )
    source = (
        f"{result['model']}; medians beside any transport on {result['device']} "
        f"({versions_text(result['versions'])}). `{result['command']}`{commit_text(result)} wrote "
        "`benchmarks/results/sync.json`."
    )
    titles = ["sent per sync", "bytes", "make and write", *models]
    return "\n".join([*table_lines(titles, lines), "", remark, "", source])


def patch_table(result: dict[str, Any]) -> str:
    """Return the Markdown table of a patch's size and times."""
    (row,) = result["rows"]

    def megabytes(name: str) -> str:
        return _megabytes(row[name])

    def duration(name: str) -> str:
        return _duration(row[name])

    lines = [
        ["checkpoint", megabytes("checkpoint_bytes"), ""],
        ["changed columns, once", megabytes("columns_bytes"), ""],
        ["patch file", megabytes("file_bytes"), f"made in {duration('make_s')}"],
        ["patch file, `--no-adapter`", megabytes("file_without_adapter_bytes"), ""],
        ["apply in memory", megabytes("columns_bytes"), duration("apply_s")],
        ["revert in memory", megabytes("columns_bytes"), duration("revert_s")],
        ["apply in place", megabytes("page_bytes"), duration("apply_in_place_s")],
        ["apply to a new folder", megabytes("checkpoint_bytes"), duration("apply_to_folder_s")],
        ["`pacatune merge --no-verify`", megabytes("checkpoint_bytes"), duration("merge_s")],
    ]
    counted = (
        f"All of LLaMA3-8B, counted: {megabytes('llama3_8b_columns_bytes')} of columns in "
        f"{megabytes('llama3_8b_bytes')}."
    )
    source = (
        f"{result['model']}; bytes that are written, and medians on {result['device']} "
        f"({versions_text(result['versions'])}). `{result['command']}`{commit_text(result)} wrote "
        "`benchmarks/results/patch.json`."
    )
    table = table_lines(["", "bytes", "time"], lines)
    return "\n".join([*table, "", counted, "", source])


def demo_table(runs: list[dict[str, Any]]) -> str:
    """Return the Markdown table of what rewards became of, seed by seed."""
    stages, kinds = ("after SFT", "after GRPO"), ("sampled", "greedy")
    lines = []
    for run in runs:
        line = [str(run["seed"])]
        for kind in kinds:
            line += [f"{run['rewards'][stage][kind]:.3f}" for stage in stages]
            line.append("{mean:+.3f} ({standard_error:.3f})".format(**run["rises"][kind]))
        lines.append(line)
    titles = [part for kind in kinds for part in (f"{kind}: after SFT", "after GRPO", "difference")]
    first = runs[0]
    numbers = {name: {run[name] for run in runs} for name in ("num_steps", "num_held_out")}
    (steps,), (problems,) = numbers.values()
    gaps = ", ".join(f"{run['gaps']['lora']:.2g}" for run in runs)
    remark = (
        f"Mean rewards of {problems} held-out problems, and the difference problem by problem with "
        f"its standard error. Gap between trainer and sampler in bfloat16: "
        f"{max(run['gaps']['paca'] for run in runs):.2g} for PaCA, {gaps} for LoRA merged."
    )
    source = (
        f"`pacatune demo-rl --seed SEED`, {steps} steps of GRPO, on {first['cpu']} "
        f"({versions_text(first['versions'])}): `benchmarks/results/demo-rl.json`. The command "
        "became `examples/grpo.py`, which measures rewards alone."
    )
    return "\n".join([*table_lines(["seed", *titles], lines), "", remark, "", source])


def distance_table(results: Path = RESULTS) -> str:
    """Return the Markdown table of where PaCA's distance to the frozen model goes."""
    result = _read("step", results)
    if result is None or "distance" not in result:
        return _missing("step")
    lines = [[row["setting"], *distance.cells(row)] for row in result["distance"]]
    titles = ["PaCA beyond frozen, % of the frozen step", *distance.TITLES]
    meanings = "; ".join(f"{name}: {text}" for name, text in distance.meanings().items())
    return "\n".join([*table_lines(titles, lines), "", meanings + ".", "", _source("step", result)])


def byte_table(name: str, results: Path = RESULTS) -> str:
    """Return the Markdown table of what one result's methods keep for backward."""
    result = _read(name.removesuffix("-more"), results)
    if result is None:
        return _missing(name)
    kept = _by_setting(
        (f"{row['counted']}, {row['dtype']}", row["method"], row["saved_bytes"] / 1e6)
        for row in result["rows"]
    )
    lines = _lines("kept for backward, MB", kept, name)
    remark = (
        f"{result['model']}: exact counts, parameters and buffers aside, from "
        f"`benchmarks/results/{name}.json`."
    )
    return "\n".join([*lines, "", remark])


def _read(name: str, results: Path) -> dict[str, Any] | None:
    path = results / f"{name}.json"
    if not path.is_file():
        return None
    result: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return result


def _missing(name: str) -> str:
    return f"Not measured yet: `make bench` writes `benchmarks/results/{name}.json`."


def _lines(what: str, values: dict[str, dict[str, float]], name: str) -> list[str]:
    """Return the rows of a table: a line per setting, a column per method."""
    methods = list(next(iter(values.values())))
    rows = []
    for setting, row in values.items():
        if set(row) != set(methods):
            raise ValueError(
                f"{name}.json: {setting!r} has {sorted(row)}, another setting {sorted(methods)}; "
                "measure all methods in all settings."
            )
        rows.append([setting, *(_cell(row, method) for method in methods)])
    return table_lines([f"{what} (PaCA's share)", *methods], rows)


def _by_setting(values: Iterable[tuple[str, str, float]]) -> dict[str, dict[str, float]]:
    """Return setting -> method -> value, in the order of the file."""
    found: dict[str, dict[str, float]] = {}
    for setting, method, value in values:
        found.setdefault(setting, {})[method] = value
    return found


def _cell(row: dict[str, float], method: str) -> str:
    text = f"{row[method]:.4g}"
    if method == OURS or row[OURS] > _MOST * row[method]:
        return text
    return f"{text} ({row[OURS] / row[method]:.2f})"


def _source(name: str, result: dict[str, Any]) -> str:
    return (
        f"{result['model']}; medians of whole steps, all methods alternating in one run, seed "
        f"{result['seed']}, on {result['device']} ({versions_text(result['versions'])}). "
        f"`{result['command']}`{commit_text(result)} wrote `benchmarks/results/{name}.json`."
    )


def _source_of_estimates(name: str, result: dict[str, Any]) -> str:
    return (
        f"{result['model']} on {result['gpu']}, estimated by a roofline and not measured "
        f"({versions_text(result['versions'])}). `{result['command']}`{commit_text(result)} wrote "
        f"`benchmarks/results/{name}.json`."
    )


_OF_THEIR_OWN: dict[str, Callable[[Any], str]] = {
    "compat": compat_table,
    "demo-rl": demo_table,
    "kernels": partial(kernel_table, is_short=True),
    "kernels-more": partial(kernel_table, is_short=False),
    "patch": patch_table,
    "sync": sync_table,
}
BLOCKS = {"table": table, "bytes": byte_table}


def main() -> None:
    """Rewrite the documents."""
    for kind, body in BLOCKS.items():
        for path in rewrite(DOCUMENTS, kind, body):
            print(f"wrote {path}")


if __name__ == "__main__":
    sys.exit(main())
