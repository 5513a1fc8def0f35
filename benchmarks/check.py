"""Compute what is exact anew, and compare it with the committed results: `make bench-check`.

    python -m benchmarks.check             kernels, bytes, column writes, estimates: a minute
    python -m benchmarks.check --all       every estimate, too

Kernels, bytes and estimates follow from the code and the versions of its packages, so that any
difference is a change: a mistake, or a reason to run the benchmark again and commit its result. A
result of other versions is not compared. The exit status is 1 if anything differs.
"""

import argparse
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import kernels, step
from benchmarks.results import prepare, read
from experiments.jobs import Finished
from experiments.moslora import add_method
from experiments.reproduce.catalogue import EXPERIMENTS
from experiments.reproduce.experiment import read_results
from pacatune.reports.provenance import package_version
from pacatune.reports.rows import Row

VERSIONS = ("torch", "transformers", "peft", "bitsandbytes")
"""What exact numbers depend on, beside the code."""
_EXACT = ("counted", "simulated")
_ESTIMATES = ("memory-", "length-", "batch-", "operations")
"""How the keys of jobs begin that estimate what the paper's tables and figures state."""
_QUICK_ESTIMATES = "memory-llama2-7b"


def run_steps(*options: str) -> list[Row]:
    """Run `benchmarks.step` as shortly as it goes, with more options; return its rows."""
    quick = ["--seconds", "0", "--min-rounds", "1", "--warmup", "0", "--threads", "1"]
    with tempfile.TemporaryDirectory() as folder:
        with redirect_stdout(sys.stderr):
            step.main([*quick, *options, "--output", folder])
        return read("step", Path(folder)).rows


QUICK: dict[str, Callable[[], list[Row]]] = {
    "kernels": partial(kernels.count, "eager", "lean", "sharded"),
    "step": partial(run_steps, "--tokens", "16", "--dtypes", "float32", "bfloat16"),
}
NAMES = (*QUICK, "estimate")


def parts(name: str, everything: bool) -> Iterator[tuple[Callable[[], list[Row]], Finished]]:
    """Yield what computes rows of a name anew, and the committed ones, each of its own versions."""
    if name in QUICK:
        yield QUICK[name], read(name)
    for title, one in EXPERIMENTS.items() if name == "estimate" else ():
        found = read_results(title)
        for job in one.jobs():
            if job.key.startswith(_ESTIMATES if everything else _QUICK_ESTIMATES):
                nothing = Finished(rows=[], provenance={"versions": {}})
                yield partial(job.run, Path("unused")), found.get(job.key, nothing)


def other_versions(made: Mapping[str, Any]) -> str:
    """Say which versions a result is of, if they are not those that are installed."""
    found = {name: made["versions"].get(name) for name in VERSIONS}
    here = {name: package_version(name) for name in VERSIONS}
    other = [name for name, one in found.items() if one not in (None, here[name])]
    return ", ".join(f"{name} {found[name]}, here {here[name]}" for name in other)


def _key(row: Row) -> tuple[str, ...]:
    return (row.what, row.method, row.model, row.setting, row.unit, row.origin)


def differences(found: Iterable[Row], rows: Iterable[Row]) -> Iterator[str]:
    """Yield a sentence for each exact number that is not as committed."""
    known = {_key(row): row for row in rows}
    for row in found:
        before = known.get(_key(row))
        title = ", ".join(filter(None, (row.what, row.method, row.model, row.setting)))
        if before is None:
            yield f"{title}: not in the committed result"
        elif (row.value, row.low, row.high) != (before.value, before.low, before.high):
            yield f"{title}: {row.value}, committed {before.value}"


def check(names: Iterable[str], *, everything: bool, say: Callable[[str], None] = print) -> int:
    """Say of each name what differs from the committed result; return how many numbers do."""
    num_differences = 0
    for name in names:
        problems, num_rows = list[str](), 0
        skipped: dict[str, None] = {}
        for compute, committed in parts(name, everything):
            if other := other_versions(committed.provenance):
                skipped[f"{name}: not compared where it is of {other}"] = None
                continue
            found = [row for row in compute() if row.origin in _EXACT]
            num_rows += len(found)
            problems += differences(found, committed.rows)
        for line in (*skipped, *(f"{name}: {problem}" for problem in problems)):
            say(line)
        num_differences += len(problems)
        if num_rows and not problems:
            say(f"{name}: {num_rows} rows as committed")
    return num_differences


def main(options: list[str] | None = None) -> int:
    """Compare, print what differs, and return the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(NAMES)}; all")
    parser.add_argument("--all", action="store_true", help="what takes minutes, too")
    args = parser.parse_args(options)
    if unknown := sorted({*args.names} - {*NAMES}):
        parser.error(f"{', '.join(unknown)}: choose from {', '.join(NAMES)}")
    prepare(args)
    add_method()
    num_differences = check(args.names or NAMES, everything=args.all)
    if num_differences:
        print(f"{num_differences} numbers differ. Meant? Run the benchmarks, commit their results.")
    return 1 if num_differences else 0


if __name__ == "__main__":
    sys.exit(main())
