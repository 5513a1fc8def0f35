"""What every result says about where it comes from, and the options that the commands share."""

import argparse
import datetime
import json
import shlex
import statistics
import sys
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from benchmarks.methods import all_methods
from pacatune.measure.timing import alternate, summarize
from pacatune.precision import bfloat16_is_fast
from pacatune.reports.provenance import Noise, commit, cpu, cpu_name, num_cores, versions

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
CODE = ("src", "benchmarks/*.py")
"""What a result is a result of; changes there are noted."""
Row = dict[str, Any]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def arguments(
    description: str | None, *, seconds: float, methods: Iterable[str] | None = None
) -> argparse.ArgumentParser:
    """Return a parser with the options that all benchmarks have; `methods` are by default all."""
    parser = new_parser(description)
    add, names = parser.add_argument, list(methods or all_methods())
    usual = "None: all but the optional ones"
    add("--methods", nargs="+", choices=names, metavar="NAME", help=usual)
    fast = [name for name in DTYPES if name != "bfloat16" or bfloat16_is_fast(use_cpu=True)]
    hardware = "by default those that this processor multiplies in hardware"
    add("--dtypes", nargs="+", default=fast, choices=list(DTYPES), help=hardware)
    add("--seconds", type=float, default=seconds, help="time for each setting, warm-up excluded")
    add("--min-rounds", type=at_least_1, default=5, help="rounds at the least")
    add("--warmup", type=int, default=2, help="rounds before, not counted")
    add_run(parser)
    return parser


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
    threads = num_cores()
    parser.add_argument("--threads", type=at_least_1, default=threads, help="torch's threads")
    parser.add_argument("--seed", type=int, default=0)


def add_tokens(parser: argparse.ArgumentParser) -> None:
    """Add the option that benchmarks on text have."""
    parser.add_argument(
        "--tokens", nargs="+", type=at_least_1, metavar="N", help="per micro-batch; None: as usual"
    )


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


def compute(
    name: str,
    description: str | None,
    options: list[str] | None,
    make: Callable[[argparse.Namespace], Row],
    **defaults: str,
) -> Path:
    """Write what nothing is measured for as NAME.json, and return its path.

    `defaults` are those of more options, which `make` reads.
    """
    parser = new_parser(description)
    for option, default in defaults.items():
        parser.add_argument(f"--{option}", default=default)
    args = parser.parse_args(options)
    quiet_peft()
    result = {
        "command": f"python -m benchmarks.{name}",
        "versions": versions("trl", "bitsandbytes"),
        **commit(ROOT, *CODE),
        **make(args),
    }
    path = write(result, args.output, name)
    print(f"wrote {path}")
    return path


def provenance(module: str, args: argparse.Namespace, options: list[str] | None) -> dict[str, Any]:
    """Return where, when and of what a measurement is; `options` are the words of the command."""
    words = sys.argv[1:] if options is None else options
    return {
        "command": " ".join(["python", "-m", module, *map(shlex.quote, words)]),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device": f"{cpu_name()}, {args.threads} thread{'s' * (args.threads > 1)}",
        "cpu": cpu(),
        "num_threads": args.threads,
        "versions": versions(),
        **commit(ROOT, *CODE),
        "seed": args.seed,
        "settings": {
            name: value for name, value in vars(args).items() if name not in ("output", "threads")
        },
    }


def take_turns(
    setting: Mapping[str, Any],
    runs: Mapping[Any, Callable[[], Any]],
    counts: Mapping[Any, Row],
    args: argparse.Namespace,
    phases: Sequence[str] = (),
    num_of_step: int | None = None,
) -> tuple[list[Row], dict[Any, list[float]]]:
    """Let methods alternate; return a row for each, with its counts, and the seconds of its rounds.

    A run returns its seconds, or those of each of `phases`; the first `num_of_step` of these, by
    default all, are the step.
    """
    noise = Noise()
    measured = alternate(
        dict(runs), seconds=args.seconds, min_rounds=args.min_rounds, num_warmup=args.warmup
    )
    surroundings = noise.to_dict()
    rows, times = [], {}
    for method, rounds in measured.items():
        times[method] = [sum(one[:num_of_step]) for one in rounds] if phases else rounds
        row = {**setting, "method": method}
        row |= summarize([1e3 * seconds for seconds in times[method]], "step_ms")
        for name, seconds in zip(phases, zip(*rounds, strict=True), strict=True) if phases else ():
            row[name] = 1e6 * statistics.median(seconds)
        rows.append(row | {"num_rounds": len(rounds), **surroundings, **counts[method]})
    return rows, times


def measure_all(
    settings: Iterable[tuple[str, Callable[[], tuple[list[Row], list[Row]]]]], console: Console
) -> tuple[list[Row], list[Row]]:
    """Measure each setting, by its label and a function; return all rows and all ratios."""
    rows: list[Row] = []
    ratios: list[Row] = []
    for label, measure in settings:
        console.print(f"measuring {label} ...")
        more_rows, more_ratios = measure()
        rows += more_rows
        ratios += more_ratios
    return rows, ratios


def write(result: dict[str, Any], folder: Path, name: str) -> Path:
    """Write a result as FOLDER/NAME.json and return the path."""
    path = folder / f"{name}.json"
    write_json(result, path)
    return path


def write_json(result: dict[str, Any], path: Path) -> None:
    """Write a result to a file, and make the folder for it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
