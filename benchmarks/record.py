"""What every result says about where it comes from, and the options that the commands share."""

import argparse
import datetime
import json
import shlex
import sys
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from benchmarks.methods import all_methods
from pacatune.precision import bfloat16_is_fast
from pacatune.reports.provenance import Noise, commit, cpu, cpu_name, num_cores, versions

__all__ = [
    "DTYPES",
    "RESULTS",
    "Noise",
    "add_tokens",
    "arguments",
    "at_least_1",
    "prepare",
    "provenance",
    "write",
]

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
CODE = ("src", "benchmarks/*.py")
"""What a result is a result of; changes there are noted."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def arguments(
    description: str | None, *, seconds: float, methods: Iterable[str] | None = None
) -> argparse.ArgumentParser:
    """Return a parser with the options that all benchmarks have.

    Args:
        description: Of the command, its first line a summary.
        seconds: Default time for each setting.
        methods: Those there are, if not `all_methods()`.
    """
    parser = argparse.ArgumentParser(
        description=(description or "").partition("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the JSON files")
    parser.add_argument(
        "--methods",
        nargs="+",
        choices=list(methods or all_methods()),
        metavar="NAME",
        help="None: all but the optional ones",
    )
    parser.add_argument(
        "--dtypes",
        nargs="+",
        default=_fast_dtypes(),
        choices=list(DTYPES),
        help="by default those that this processor multiplies in hardware",
    )
    parser.add_argument(
        "--seconds", type=float, default=seconds, help="time for each setting, warm-up excluded"
    )
    parser.add_argument("--min-rounds", type=at_least_1, default=5, help="rounds at the least")
    parser.add_argument("--warmup", type=int, default=2, help="rounds before, not counted")
    parser.add_argument("--threads", type=at_least_1, default=num_cores(), help="torch's threads")
    parser.add_argument("--seed", type=int, default=0)
    return parser


def add_tokens(parser: argparse.ArgumentParser) -> None:
    """Add the option that benchmarks on text have."""
    parser.add_argument(
        "--tokens", nargs="+", type=at_least_1, metavar="N", help="per micro-batch; None: as usual"
    )


def _fast_dtypes() -> list[str]:
    return [name for name in DTYPES if name != "bfloat16" or bfloat16_is_fast(use_cpu=True)]


def at_least_1(text: str) -> int:
    """Read an option's number."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be an integer of at least 1, got {text}")
    return number


def prepare(args: argparse.Namespace) -> None:
    """Set threads and seed; choose how float32 is multiplied."""
    # PEFT asks transformers in an old way.
    warnings.filterwarnings("ignore", ".*is_gradient_checkpointing", FutureWarning)
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision("highest")


def provenance(module: str, args: argparse.Namespace, options: list[str] | None) -> dict[str, Any]:
    """Return where, when and of what the measurement is.

    Args:
        module: Name of the command's module.
        args: The command's options.
        options: What they were read from; None: the command line.
    """
    words = sys.argv[1:] if options is None else options
    return {
        "command": " ".join(["python", "-m", module, *map(shlex.quote, words)]),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device": f"{cpu_name()}, {args.threads} threads",
        "cpu": cpu(),
        "num_threads": args.threads,
        "versions": versions(),
        **commit(ROOT, *CODE),
        "seed": args.seed,
        "settings": {
            name: value for name, value in vars(args).items() if name not in ("output", "threads")
        },
    }


def write(result: dict[str, Any], folder: Path, name: str) -> Path:
    """Write a result as FOLDER/NAME.json and return the path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return path
