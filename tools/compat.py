"""Run the core's tests and PEFT's own beside other releases of PEFT, transformers and torch.

    python tools/compat.py                      every combination of tools/compat, then a table
    python tools/compat.py floors -- -k merge   one of them; what follows -- goes to pytest
    python tools/compat.py --json FILE          also writes the counts, of earlier runs as well

Each combination is a file of pip constraints. It gets an environment under .cache/compat with the
core alone, without any extra, and the packages that tests import. `floors` brings a torch from the
package index, which is a build for GPUs of several GB; the tests need no GPU.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import venv
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
TABLE = Path(__file__).with_suffix("")
CACHE = ROOT / ".cache" / "compat"

SHOWN = ("torch", "transformers", "peft", "accelerate", "safetensors")
# What needs the core alone; a test in there that needs more skips itself.
CORE_TESTS = (
    *("ops", "residency", "lean", "tuner", "selection", "adapters"),
    *("patch", "sync", "files", "format", "core"),
)
TEST_PACKAGES = (
    *("pytest>=8.3,<10", "pytest-xdist>=3.6,<4", "hypothesis>=6.120,<7"),
    # Quantised bases: the one optional package that old releases of PEFT are tested with.
    "bitsandbytes>=0.50,<1",
    # Imported by PEFT's own tests, and what reads the version of their source distribution.
    # Imported by benchmarks, whose counts tests check.
    "rich>=13,<16",
    *("datasets>=4,<6", "diffusers>=0.35,<1", "parameterized>=0.9,<1", "Pillow", "setuptools>=77"),
)
COMMANDS = {
    # Old releases warn of what newer packages deprecate; in `make test` a warning is an error.
    "core": ["-m", "pytest", "-o", "filterwarnings=default", *(f"tests/{n}" for n in CORE_TESTS)],
    "conformance": ["tests/conformance/run.py"],
}


def prepare(constraints: Path) -> Path:
    """Return the interpreter of a combination's environment, made anew where anything changed."""
    folder = CACHE / constraints.stem
    python = folder / "bin" / "python"
    stamp = folder / "installed"
    parts = (constraints, ROOT / "pyproject.toml", Path(__file__))
    wanted = hashlib.sha256(b"".join(part.read_bytes() for part in parts)).hexdigest()
    if stamp.is_file() and stamp.read_text() == wanted:
        return python
    print(f"compat: making {folder.relative_to(ROOT)}", flush=True)
    venv.create(folder, clear=True, with_pip=True)
    pip = [str(python), "-m", "pip", "install", "-q", "--disable-pip-version-check"]
    command = [*pip, "-c", str(constraints), "-e", str(ROOT), *TEST_PACKAGES]
    subprocess.run(command, check=True)
    stamp.write_text(wanted)
    return python


def versions(python: Path) -> dict[str, str]:
    """Return what is installed there."""
    code = "import sys, importlib.metadata as m; print(*map(m.version, sys.argv[1:]))"
    command = [str(python), "-c", code, *SHOWN]
    found = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    return dict(zip(SHOWN, found, strict=True))


def run_tests(python: Path, command: list[str], extra: list[str], report: Path) -> bool:
    """Run tests, whose counts go into a report; return whether all is well."""
    report.unlink(missing_ok=True)
    # A worker of its own: one test limits the size of files, a log that is written to among them.
    options = ["-q", "--tb=short", "-p", "no:cacheprovider", f"--junitxml={report}", "-n", "1"]
    settings = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    status = subprocess.run(
        [str(python), *command, *options, *extra], cwd=ROOT, env=os.environ | settings, check=False
    ).returncode
    return status == 0 and counts_of(report).get("passed", 0) > 0


def counts_of(report: Path) -> dict[str, int]:
    """Return how many tests passed, failed and were skipped; nothing without a report."""
    if not report.is_file():
        return {}
    suites = ElementTree.parse(report).getroot().findall("testsuite")
    total, failed, errors, skipped = (
        sum(int(suite.get(name, 0)) for suite in suites)
        for name in ("tests", "failures", "errors", "skipped")
    )
    bad = failed + errors
    return {"passed": total - bad - skipped, "failed": bad, "skipped": skipped}


def summary(names: list[str]) -> dict[str, dict[str, Any]]:
    """Return versions and counts of the combinations whose tests have run."""
    found: dict[str, dict[str, Any]] = {}
    for name in names:
        counts = {half: counts_of(CACHE / f"{name}-{half}.xml") for half in COMMANDS}
        if any(counts.values()):
            found[name] = {"versions": versions(CACHE / name / "bin" / "python"), **counts}
    return found


def main() -> int:
    """Run the combinations that are named, all by default; fail where a test does."""
    names = sorted(path.stem for path in TABLE.glob("*.txt"))
    words, end = sys.argv[1:], len(sys.argv) - 1
    if "--" in words:
        end = words.index("--")
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"some of {', '.join(names)}")
    parser.add_argument("--only", choices=tuple(COMMANDS), help="one half of the tests")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the counts there")
    chosen = parser.parse_args(words[:end])
    if unknown := sorted(set(chosen.names) - set(names)):
        parser.error(f"unknown: {', '.join(unknown)}; choose from {', '.join(names)}")
    is_good = True
    for name in chosen.names or names:
        python = prepare(TABLE / f"{name}.txt")
        for half, command in COMMANDS.items():
            if chosen.only in (None, half):
                print(f"compat: {name}, {half}", flush=True)
                report = CACHE / f"{name}-{half}.xml"
                is_good = run_tests(python, command, words[end + 1 :], report) and is_good
    found = summary(names if chosen.json else chosen.names or names)
    for name, row in found.items():
        print(f"{name}: " + ", ".join(f"{k} {v}" for k, v in row["versions"].items()))
        for half in COMMANDS:
            counts = ", ".join(f"{number} {kind}" for kind, number in row[half].items())
            print(f"    {half:<12} {counts or 'not run'}")
    if chosen.json:
        chosen.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return 0 if is_good else 1


if __name__ == "__main__":
    raise SystemExit(main())
