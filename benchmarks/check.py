"""Compute what is exact anew, and compare it with the committed results: `make bench-check`.

    python -m benchmarks.check             kernels, bytes, column writes, estimates: a minute
    python -m benchmarks.check --all       kernels of compiled models and every estimate, too
    python -m benchmarks.check --times     ratios of times of step and switch, too

Kernels, bytes and estimates follow from the code and the versions of its packages, so that any
difference is a change: a mistake, or a reason to run the benchmark again and commit its result. A
result of other versions is not compared. Ratios of times may be 15 % above the committed ones; it
takes half an hour on quiet cores. Those of another processor are shown, and do not count. The exit
status is 1 if anything differs.
"""

import argparse
import importlib
import shlex
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from benchmarks import kernels, lengths, roofline
from benchmarks.results import quiet_peft, read
from experiments.reproduce.catalogue import EXPERIMENTS
from experiments.reproduce.experiment import read_results
from pacatune.reports.provenance import cpu_name, package_version
from pacatune.reports.rows import Row

VERSIONS = ("torch", "transformers", "peft", "bitsandbytes")
"""What exact numbers depend on, beside the code."""
TIMED = ("step", "switch")
SLOWER = 1.15
"""The highest ratio of a ratio of times to the committed one."""
_QUICK = ["--seconds", "0", "--min-rounds", "1", "--warmup", "0", "--threads", "1"]
_BOTH = ("--dtypes", "float32", "bfloat16")
_EXACT = ("counted", "simulated")


def measured(name: str, options: Iterable[str]) -> list[Row]:
    """Run a benchmark with options of its own; return its rows."""
    module = importlib.import_module(f"benchmarks.{name}")
    with tempfile.TemporaryDirectory() as folder:
        with redirect_stdout(sys.stderr):
            module.main([*options, "--output", folder])
        return read(name, Path(folder)).rows


def eager_kernels() -> list[Row]:
    """Count the kernels of every method, and of sharded models."""
    found = {"eager": (False,), "lean": (True,)}
    counts = {kind: kernels.count_all(kernels.MODELS, lean) for kind, lean in found.items()}
    counts["sharded"] = kernels.count_each(kernels.count_sharded)
    return [row for kind, rows in counts.items() for row in kernels.rows_of(kind, rows)]


def compiled_kernels() -> list[Row]:
    """Count the kernels of compiled models."""
    return kernels.rows_of("compiled", kernels.count_each(kernels.count_compiled))


def memory(keys: Callable[[str], bool]) -> list[Row]:
    """Estimate the memory of lines of the paper's Tables 1 and 3, and the lengths of Table 4."""
    jobs = [job for name in _ESTIMATED for job in EXPERIMENTS[name].jobs("small")]
    chosen = [job for job in jobs if job.key.startswith(("memory-", "length-")) and keys(job.key)]
    return [row for job in chosen for row in job.run(Path("unused"))]


_ESTIMATED = ("table1", "table3", "table4")
EXACT: dict[str, Callable[[], list[Row]]] = {
    "kernels": eager_kernels,
    "step": lambda: measured("step", [*_QUICK, "--tokens", "16", *_BOTH]),
    "switch": lambda: measured("switch", [*_QUICK, "--tokens", "16", "--dtypes", "float32"]),
    "estimate": lambda: memory(lambda key: key.startswith("memory-llama2-7b")),
}
SLOW: dict[str, Callable[[], list[Row]]] = {
    "kernels": compiled_kernels,
    "estimate": lambda: memory(lambda key: not key.startswith("memory-llama2-7b")),
    "lengths": lengths.found,
    "roofline": lambda: roofline.estimate_all("llama3-8b", "h100"),
}


def committed(name: str) -> tuple[list[Row], Mapping[str, Any]]:
    """Return the rows of a committed result, and where they come from."""
    if name != "estimate":
        result = read(name)
        return result.rows, result.provenance
    found = [job for one in _ESTIMATED for job in read_results(one, "small").values()]
    return [row for job in found for row in job.rows], found[0].provenance


def other_versions(made: Mapping[str, Any]) -> str:
    """Say which versions a result is of, if they are not those that are installed."""
    found = {name: made["versions"].get(name) for name in VERSIONS}
    here = {name: package_version(name) for name in VERSIONS}
    other = [name for name, one in found.items() if one not in (None, here[name])]
    return ", ".join(f"{name} {found[name]}, here {here[name]}" for name in other)


def other_processor(made: Mapping[str, Any]) -> str:
    """Name the processor of a result, if it is not this one."""
    name = str(made["cpu"]["name"])
    return "" if name == cpu_name() else f"{name}, here {cpu_name()}"


def _key(row: Row) -> tuple[str, ...]:
    return (row.what, row.method, row.model, row.setting, row.unit, row.origin)


def _title(row: Row) -> str:
    return ", ".join(filter(None, (row.what, row.method, row.model, row.setting)))


def differences(found: Iterable[Row], rows: Iterable[Row]) -> Iterator[str]:
    """Yield a sentence for each exact number that is not as committed."""
    known = {_key(row): row for row in rows}
    for row in found:
        before = known.get(_key(row))
        if before is None:
            yield f"{_title(row)}: not in the committed result"
        elif (row.value, row.low, row.high) != (before.value, before.low, before.high):
            yield f"{_title(row)}: {row.value}, committed {before.value}"


def slower(found: Iterable[Row], rows: Iterable[Row]) -> Iterator[str]:
    """Yield a sentence for each ratio of times that is more than 15 % above the committed one."""
    known = {_key(row): row.value for row in rows}
    for row in found:
        before = known.get(_key(row))
        if before is None:
            yield f"{_title(row)}: the ratio of times is not in the committed result"
        elif row.value > SLOWER * before:
            yield f"{_title(row)}: the ratio of times is {row.value:.3f}, committed {before:.3f}"


def check(
    names: Iterable[str], *, everything: bool, times: bool, say: Callable[[str], None] = print
) -> int:
    """Compare the results of these names; return how many numbers differ."""
    num_differences = 0
    for name in names:
        (rows, made), problems, num_rows = committed(name), list[str](), 0
        exact = [table[name] for table in (EXACT, SLOW if everything else {}) if name in table]
        if other := other_versions(made):
            say(f"{name}: not compared, since it is of {other}")
            exact = []
        for compute in exact:
            found = [row for row in compute() if row.origin in _EXACT]
            num_rows += len(found)
            problems += differences(found, rows)
        if times and name in TIMED:
            words = shlex.split(made["command"])[3:]
            ratios = [row for row in measured(name, words) if row.unit == "ratio"]
            above = list(slower(ratios, rows))
            say(f"{name}: {len(ratios) - len(above)} of {len(ratios)} ratios of times as committed")
            if above and (other := other_processor(made)):
                say(f"{name}: the committed times are of {other}; these do not count:")
                for one in above:
                    say(f"{name}: {one}")
            else:
                problems += above
        for problem in problems:
            say(f"{name}: {problem}")
        num_differences += len(problems)
        if num_rows and not problems:
            say(f"{name}: {num_rows} rows as committed")
    return num_differences


def main(options: list[str] | None = None) -> int:
    """Compare, print what differs, and return the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    every = list(dict.fromkeys([*EXACT, *SLOW]))
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(every)}; all")
    parser.add_argument("--all", action="store_true", help="what takes minutes, too")
    parser.add_argument("--times", action="store_true", help="ratios of times, too")
    args = parser.parse_args(options)
    if unknown := sorted({*args.names} - {*every}):
        parser.error(f"{', '.join(unknown)}: choose from {', '.join(every)}")
    quiet_peft()
    num_differences = check(args.names or every, everything=args.all, times=args.times)
    if num_differences:
        print(f"{num_differences} numbers differ. Meant? Run the benchmarks, commit their results.")
    return 1 if num_differences else 0


if __name__ == "__main__":
    from pacatune.cli.options import quiet_libraries

    quiet_libraries()
    sys.exit(main())
