"""Run the core's tests and PEFT's own beside other releases of PEFT, transformers and torch.

    python tools/compat.py                      every combination of tools/compat, then a table
    python tools/compat.py floors -- -k merge   one of them; what follows -- goes to pytest

Each combination is a file of pip constraints. It gets an environment under .cache/compat with the
core alone, without any extra, and the packages that tests import. `floors` brings a torch from the
package index, which is a build for GPUs of several GB; the tests need no GPU.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import subprocess
import sys
import venv
import xml.etree.ElementTree as ElementTree
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TABLE = Path(__file__).with_suffix("")
CACHE = ROOT / ".cache" / "compat"

SHOWN = ("torch", "transformers", "peft", "accelerate", "safetensors")
# What needs the core alone; a test in there that needs more skips itself.
CORE_TESTS = ("ops", "residency", "lean", "tuner", "selection", "adapters", "core")
TEST_PACKAGES = ("pytest>=8.3,<10", "pytest-xdist>=3.6,<4", "hypothesis>=6.120,<7")
# Imported by PEFT's own tests.
PEFT_TEST_PACKAGES = ("datasets>=4,<6", "diffusers>=0.35,<1", "parameterized>=0.9,<1", "Pillow")
# Old releases warn of what newer packages deprecate; in `make test` a warning is an error.
PYTEST = ("-q", "--tb=short", "-p", "no:cacheprovider")


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
    pip += ["-c", str(constraints)]
    packages = [*TEST_PACKAGES, *PEFT_TEST_PACKAGES]
    subprocess.run([*pip, "-e", str(ROOT), *packages], check=True)
    stamp.write_text(wanted)
    return python


def versions(python: Path) -> list[str]:
    """Return what is installed there, as `name version`."""
    code = "import sys, importlib.metadata as m; print(*map(m.version, sys.argv[1:]))"
    found = subprocess.run(
        [python, "-c", code, *SHOWN], capture_output=True, text=True, check=True
    ).stdout.split()
    return [f"{name} {version}" for name, version in zip(SHOWN, found, strict=True)]


def run_tests(python: Path, command: list[str], report: Path) -> str:
    """Run tests and return how many passed, failed and were skipped."""
    report.unlink(missing_ok=True)
    settings = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    subprocess.run(
        [python, *command, *PYTEST, f"--junitxml={report}"],
        cwd=ROOT,
        env=os.environ | settings,
        check=False,
    )
    if not report.is_file():
        return "no result"
    suites = ElementTree.parse(report).getroot().findall("testsuite")
    total, failed, errors, skipped = (
        sum(int(suite.get(name, 0)) for suite in suites)
        for name in ("tests", "failures", "errors", "skipped")
    )
    bad = failed + errors
    return f"{total - bad - skipped} passed, {bad} failed, {skipped} skipped"


def main() -> int:
    """Run the combinations that are named, all by default; fail where a test does."""
    names = sorted(path.stem for path in TABLE.glob("*.txt"))
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"some of {', '.join(names)}")
    parser.add_argument("--only", choices=("core", "conformance"), help="one half of the tests")
    words, _, options = " ".join(sys.argv[1:]).partition(" -- ")
    chosen = parser.parse_args(words.split())
    if unknown := sorted(set(chosen.names) - set(names)):
        parser.error(f"unknown: {', '.join(unknown)}; choose from {', '.join(names)}")
    commands = {
        "core": ["-m", "pytest", "-o", "filterwarnings=default"],
        "conformance": ["tests/conformance/run.py"],
    }
    commands["core"] += [f"tests/{name}" for name in CORE_TESTS if (ROOT / "tests" / name).exists()]
    rows = []
    for name in chosen.names or names:
        python = prepare(TABLE / f"{name}.txt")
        print(f"compat: {name}: {', '.join(versions(python))}", flush=True)
        for half, command in commands.items():
            if chosen.only in (None, half):
                report = CACHE / f"{name}-{half}.xml"
                result = run_tests(python, [*command, *options.split()], report)
                rows.append((name, half, result))
    print("compat:")
    for name, half, result in rows:
        print(f"  {name:<15} {half:<12} {result}")
    return 0 if all(" 0 failed" in result for *_, result in rows) else 1


if __name__ == "__main__":
    raise SystemExit(main())
