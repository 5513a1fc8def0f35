"""Compute what is exact anew, and compare it with the committed results: `make bench-check`.

    python -m benchmarks.check             kernels, bytes, column writes, estimates: a minute
    python -m benchmarks.check --all       kernels of compiled models and every estimate, too
    python -m benchmarks.check --times     ratios of times of step, layer and switch, too

Kernels, bytes and estimates follow from the code and the versions of its packages, so that any
difference is a change: a mistake, or a reason to run the benchmark again and commit its result. A
result of other versions is not compared. Ratios of times may be 15 % above the committed ones; it
takes half an hour on quiet cores. Those of another processor are shown, and do not count. The exit
status is 1 if anything differs.
"""

import argparse
import importlib
import json
import re
import shlex
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from benchmarks import estimate, kernels, lengths
from benchmarks.record import RESULTS, Row, quiet_peft
from pacatune.reports.provenance import cpu_name, package_version

VERSIONS = ("torch", "transformers", "peft", "bitsandbytes")
"""What exact numbers depend on, beside the code."""
TIMED = ("step", "layer", "switch")
SLOWER = 1.15
"""The highest ratio of a ratio of times to the committed one."""
# What says which row a row is.
_NAMES = ("setting", "method", "reference", "is_lean", "model", "rank", "adapters", "level")
_NAMES += ("checkpointing", "offloading", "dropout", "lean")
_MEASURED = re.compile(r".*_(ms|us|s)(_\w+)?|num_rounds|load_average|num_cores_of_others")
_QUICK = ["--seconds", "0", "--min-rounds", "1", "--warmup", "0", "--threads", "1"]
_BOTH = ("--dtypes", "float32", "bfloat16")

Sections = dict[str, list[Row]]
"""Rows of a result, by their key in its file."""


def measured(name: str, options: Iterable[str]) -> Sections:
    """Run a benchmark with options of its own; return its rows and its ratios of times."""
    module = importlib.import_module(f"benchmarks.{name}")
    with tempfile.TemporaryDirectory() as folder:
        with redirect_stdout(sys.stderr):
            module.main([*options, "--output", folder])
        result = json.loads((Path(folder) / f"{name}.json").read_text(encoding="utf-8"))
    return {"rows": result["rows"], "ratios": result["ratios"]}


def exact_rows(name: str, *options: str) -> Sections:
    """Return the rows of a benchmark that is run for its counts alone."""
    return {"rows": measured(name, [*_QUICK, *options])["rows"]}


def kernel_rows() -> Sections:
    """Count the kernels of every method, and of sharded models."""
    return {
        "rows": kernels.count_all(kernels.MODELS),
        "sharded": kernels.count_each(kernels.count_sharded),
    }


def estimate_rows() -> Sections:
    """Estimate what one model takes, of those in the paper's Table 1."""
    return {"table_1": estimate.rows_of_table_1(["llama2-7b"])}


def all_estimates() -> Sections:
    """Estimate every cell of the paper's tables: seven minutes."""
    return {
        "table_1": estimate.rows_of_table_1(),
        "table_3": estimate.rows_of_table_3(),
        "table_4": estimate.rows_of_table_4(),
    }


EXACT: dict[str, Callable[[], Sections]] = {
    "kernels": kernel_rows,
    "step": lambda: exact_rows("step", "--tokens", "16", *_BOTH),
    "layer": lambda: exact_rows("layer", "--tokens", "16", *_BOTH),
    "switch": lambda: exact_rows("switch", "--tokens", "16", "--dtypes", "float32"),
    "estimate": estimate_rows,
}
SLOW: dict[str, Callable[[], Sections]] = {
    "kernels": lambda: {"compiled": kernels.count_each(kernels.count_compiled)},
    "estimate": all_estimates,
    "lengths": lengths.found,
}


def committed(name: str) -> dict[str, Any]:
    """Return a committed result."""
    result: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    return result


def other_versions(result: dict[str, Any]) -> str:
    """Say which versions a result is of, if they are not those that are installed."""
    found = {name: result["versions"].get(name) for name in VERSIONS}
    here = {name: package_version(name) for name in VERSIONS}
    other = [name for name, one in found.items() if one not in (None, here[name])]
    return ", ".join(f"{name} {found[name]}, here {here[name]}" for name in other)


def other_processor(result: dict[str, Any]) -> str:
    """Say which processor a result is of, if it is not this one."""
    name, here = result["cpu"]["name"], cpu_name()
    return "" if name == here else f"{name}, here {here}"


def differences(found: Sections, result: dict[str, Any]) -> Iterator[str]:
    """Yield what is exact in rows and not as in the committed result, a sentence each."""
    for section, rows in found.items():
        known = {_key(row): row for row in result[section]}
        for row in rows:
            title = f"{section}, {_title(row)}"
            if _key(row) not in known:
                yield f"{title}: not in the committed result"
                continue
            before = _exact(known[_key(row)])
            for name, value in _exact(row).items():
                if name not in before:
                    yield f"{title}: {name} is not in the committed result"
                elif value != before[name]:
                    yield f"{title}: {name} is {value}, committed {before[name]}"


def slower(ratios: Iterable[Row], result: dict[str, Any]) -> Iterator[str]:
    """Yield each ratio of times that is more than 15 % above the committed one."""
    known = {_key(row): row["ratio"] for row in result["ratios"]}
    for row in ratios:
        before = known.get(_key(row))
        if before is None:
            yield f"{_title(row)}: the ratio of times is not in the committed result"
        elif row["ratio"] > SLOWER * before:
            yield (
                f"{_title(row)}: the ratio of times is {row['ratio']:.3f}, committed {before:.3f}"
            )


def _key(row: Row) -> tuple[Any, ...]:
    return tuple(row.get(name) for name in _NAMES)


def _title(row: Row) -> str:
    return ", ".join(f"{name} {row[name]}" for name in _NAMES if name in row)


def _exact(row: Row) -> Row:
    return {name: value for name, value in row.items() if not _MEASURED.fullmatch(name)}


def check(
    names: Iterable[str], *, everything: bool, times: bool, say: Callable[[str], None] = print
) -> int:
    """Compare the results of these names; return how many numbers differ."""
    num_differences = 0
    for name in names:
        result, problems = committed(name), list[str]()
        exact = [table[name] for table in (EXACT, SLOW if everything else {}) if name in table]
        if other := other_versions(result):
            say(f"{name}: not compared, since it is of {other}")
            exact = []
        num_rows = 0
        for compute in exact:
            found = compute()
            num_rows += sum(map(len, found.values()))
            problems += differences(found, result)
        if times and name in TIMED:
            # Which dtypes are measured by default, this processor would decide.
            dtypes = ["--dtypes", *result["settings"]["dtypes"]]
            ratios = measured(name, [*shlex.split(result["command"])[3:], *dtypes])["ratios"]
            above = list(slower(ratios, result))
            say(f"{name}: {len(ratios) - len(above)} of {len(ratios)} ratios of times as committed")
            if above and (other := other_processor(result)):
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
