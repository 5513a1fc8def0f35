"""Results of benchmarks: rows, and where they come from; the options that the commands share."""

import argparse
import datetime
import json
import shlex
import statistics
import sys
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import torch

from benchmarks.methods import OURS, all_methods
from pacatune.measure.timing import alternate, ratio_row, time_row
from pacatune.precision import bfloat16_is_fast
from pacatune.reports.provenance import (
    Noise,
    commit,
    commit_text,
    cpu,
    cpu_name,
    num_cores,
    versions,
    versions_text,
)
from pacatune.reports.rows import Row, table

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
CODE = ("src", "benchmarks/*.py")
"""What a result is a result of; changes there are noted."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, kw_only=True)
class Result:
    """A file of `results`: rows, what their methods are, and where they come from."""

    name: str
    rows: list[Row]
    methods: Mapping[str, str]
    """Method -> what it is, where its name does not say it."""
    provenance: Mapping[str, Any]

    def source(self) -> str:
        """Return a sentence for a document: how and where, by which command."""
        made = self.provenance
        where = f", on {made['device']}" if made.get("device") else ""
        return (
            f"{made['how']}{where} ({versions_text(made['versions'])}). `{made['command']}`"
            f"{commit_text(made)} wrote `benchmarks/results/{self.name}.json`."
        )

    def write(self, folder: Path) -> Path:
        """Write FOLDER/NAME.json and return its path."""
        path = folder / f"{self.name}.json"
        rows = [row.to_dict() for row in self.rows]
        write_json({**self.provenance, "methods": dict(self.methods), "rows": rows}, path)
        return path


def read(name: str, folder: Path = RESULTS) -> Result:
    """Return a result; an error if it was not written yet."""
    path = folder / f"{name}.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; `python -m benchmarks.{name}` writes it.")
    values = json.loads(path.read_text(encoding="utf-8"))
    rows = [Row(**row) for row in values.pop("rows")]
    return Result(name=name, rows=rows, methods=values.pop("methods"), provenance=values)


def write_json(values: Any, path: Path) -> None:
    """Write values to a file, and make the folder for it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(values, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def new_parser(description: str | None) -> argparse.ArgumentParser:
    """Return a parser with the option that all commands have: where the result goes."""
    parser = argparse.ArgumentParser(
        description=(description or "").partition("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the JSON file")
    return parser


def add_run(parser: argparse.ArgumentParser, **sizes: int) -> None:
    """Add what `prepare` reads, after options that are numbers of at least 1, with defaults."""
    for name, default in sizes.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=at_least_1, default=default)
    parser.add_argument("--threads", type=at_least_1, default=num_cores(), help="torch's threads")
    parser.add_argument("--seed", type=int, default=0)


def timed_parser(
    description: str | None, *, seconds: float, methods: Iterable[str] | None = None
) -> argparse.ArgumentParser:
    """Return a parser with the options of a measurement; `methods` are by default all."""
    parser = new_parser(description)
    add, names = parser.add_argument, list(methods or all_methods())
    usual = "None: all but the optional ones"
    add("--methods", nargs="+", choices=names, metavar="NAME", help=usual)
    fast = [name for name in DTYPES if name != "bfloat16" or bfloat16_is_fast(use_cpu=True)]
    hardware = "by default those that this processor multiplies in hardware"
    add("--dtypes", nargs="+", default=fast, choices=list(DTYPES), help=hardware)
    add("--tokens", nargs="+", type=at_least_1, metavar="N", help="per micro-batch; None: as usual")
    add("--seconds", type=float, default=seconds, help="time for each setting, warm-up excluded")
    add("--min-rounds", type=at_least_1, default=5, help="rounds at the least")
    add("--warmup", type=int, default=2, help="rounds before, not counted")
    add_run(parser)
    return parser


def at_least_1(text: str) -> int:
    """Read an option's number."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be an integer of at least 1, got {text}")
    return number


def prepare(args: argparse.Namespace) -> None:
    """Set threads and seed; choose how float32 is multiplied."""
    quiet_peft()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision("highest")


def quiet_peft() -> None:
    """Ignore that PEFT asks transformers in an old way."""
    warnings.filterwarnings("ignore", ".*is_gradient_checkpointing", FutureWarning)


def provenance(
    name: str, how: str, options: list[str] | None, args: argparse.Namespace | None = None
) -> dict[str, Any]:
    """Return where a result comes from; `args` are those of a measurement, None if it has no clock.

    `how` says in words what was measured, `options` are the words of the command.
    """
    words = sys.argv[1:] if options is None else options
    made: dict[str, Any] = {
        "how": how,
        "command": shlex.join(["python", "-m", f"benchmarks.{name}", *words]),
        "versions": versions("trl", "bitsandbytes"),
        **commit(ROOT, *CODE),
    }
    if args is not None:
        threads = f"{args.threads} thread{'s' * (args.threads > 1)}"
        made |= {
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "device": f"{cpu_name()}, {threads}",
            "cpu": cpu(),
        }
    return made


Run = Callable[[], "float | Sequence[float]"]


def take_turns(
    runs: Mapping[str, Run],
    args: Any,
    *,
    phases: Sequence[str] = (),
    num_of_step: int | None = None,
    pairs: Iterable[tuple[str, str]] | None = None,
    **names: str,
) -> tuple[list[Row], dict[str, Any]]:
    """Let methods alternate; return rows of their steps, phases and ratios, and what else went on.

    Args:
        runs: Method -> what makes a round and returns its seconds, or those of each of `phases`.
        args: Has `seconds`, `min_rounds`, `warmup` and `seed`.
        phases: Names of the phases, whose medians are rows in microseconds.
        num_of_step: How many of the phases, from the first, are the step; by default all.
        pairs: Methods whose steps are compared; by default ours with each other one.
        **names: `model` and `setting` of the rows.
    """
    noise = Noise()
    rounds = alternate(
        dict(runs), seconds=args.seconds, min_rounds=args.min_rounds, num_warmup=args.warmup
    )
    rows: list[Row] = []
    steps: dict[str, list[float]] = {}
    for method, measured in rounds.items():
        of_phases = [one if isinstance(one, Sequence) else (one,) for one in measured]
        steps[method] = [sum(one[:num_of_step]) for one in of_phases]
        rows.append(time_row(steps[method], what="step", method=method, **names))
        common = {"method": method, "n": len(measured), **names}
        for phase, seconds in zip(phases, zip(*of_phases, strict=True), strict=False):
            value = 1e6 * statistics.median(seconds)
            rows.append(Row(what=phase, value=value, unit="us", **common))  # type: ignore[arg-type]
    for ours, other in _pairs(steps) if pairs is None else pairs:
        both, title = (steps[ours], steps[other]), f"{ours} / {other}"
        rows.append(ratio_row(*both, seed=args.seed, what="step", method=title, **names))
    return rows, noise.to_dict()


def _pairs(methods: Iterable[str]) -> list[tuple[str, str]]:
    return [
        (OURS, other)
        for one in combinations(methods, 2)
        if OURS in one
        for other in {*one} - {OURS}
    ]


def show(result: Result, folder: Path) -> None:
    """Write a result, and print its ratios, or all of its rows where it has none."""
    ratios = [row for row in result.rows if row.unit == "ratio"]
    index = ("model", "setting") if ratios else ("model", "setting", "what", "unit")
    shown = table(ratios or result.rows, index, ("what", "method") if ratios else ("method",))
    print("\n".join(shown.plain()))
    print(f"wrote {result.write(folder)}")


def counted(what: str, method: str, value: float, unit: str = "", **names: str) -> Row:
    """Return a number that needs no clock."""
    return Row(what=what, method=method, value=value, unit=unit, origin="counted", **names)  # type: ignore[arg-type]
