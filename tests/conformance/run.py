#!/usr/bin/env python3
"""Run Hugging Face PEFT's own test-suite against our method.

Nothing of PEFT is copied: the tests come from the source distribution of the installed release,
fetched once with pip into .cache/, and their `parametrize` lists are *replaced* by cases for the
method under test. Tests on which no list was replaced (those about LoRA only) are deselected.

    python tests/conformance/run.py                  all that pacatune claims
    python tests/conformance/run.py --quick          custom and config; a note when offline
    python tests/conformance/run.py -n 2 -k merge    further options go to pytest

The suites custom and config need no models; the others run on random tiny models, written under
the names that the tests expect, so no hub is reached.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
CACHE = HERE.parents[1] / ".cache"
sys.path.insert(0, str(HERE))

from peft_plugin import SUITES  # noqa: E402 (needs the path above)
from tiny_models import write_tiny_models  # noqa: E402

QUICK_SUITES = "custom,config"


def fetch_peft_tests(cache):
    """Return the tests folder of the installed PEFT release, downloading its sdist when it is new.

    Raises:
        RuntimeError: If pip cannot get the sdist.
    """
    name = f"peft-{version('peft')}"
    tests = cache / name / "tests"
    if tests.is_dir():
        return tests
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as scratch:
        command = [sys.executable, "-m", "pip", "download", "-q", "--disable-pip-version-check"]
        command += ["--no-deps", "--no-binary", "peft", "--no-build-isolation", "-d", scratch]
        result = subprocess.run([*command, name.replace("-", "==")], capture_output=True, text=True)
        if result.returncode:
            reason = (result.stderr.strip() or result.stdout.strip()).splitlines()[-1:]
            raise RuntimeError(f"pip could not download the source of {name}: {' '.join(reason)}")
        with tarfile.open(next(Path(scratch).glob("*.tar.gz"))) as archive:
            archive.extractall(scratch, filter="data")
        # Moved into place last, so that an interrupted download is never taken for a whole one.
        Path(scratch, name).rename(cache / name)
    return tests


def view(tests):
    """Make a throw-away package of links to the tests, whose relative imports need one."""
    root = Path(tempfile.mkdtemp(prefix="peft-conformance-"))
    package = root / "tests"
    package.mkdir()
    for entry in Path(tests).resolve().iterdir():
        if entry.suffix == ".py" and entry.name != "conftest.py":
            (package / entry.name).symlink_to(entry)
    (package / "__init__.py").touch()
    (root / "pytest.ini").write_text("[pytest]\naddopts = -p no:cacheprovider -W ignore\n")
    return root


def parse(argv):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help=f"suites {QUICK_SUITES} only")
    parser.add_argument("--suites", help=f"some of {','.join(SUITES)}")
    options, rest = parser.parse_known_args(argv)
    suites = options.suites or (QUICK_SUITES if options.quick else ",".join(SUITES))
    options.suites = suites.split(",")
    if unknown := sorted(set(options.suites) - set(SUITES)):
        parser.error(f"unknown: {', '.join(unknown)}; choose from {', '.join(SUITES)}")
    return options, rest


def set_environment(suites):
    """Let xdist's workers find the plugin and the models, and keep every process offline."""
    paths = [str(HERE), os.environ.get("PYTHONPATH", "")]
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1")
    # Each release of transformers writes models in its own way.
    models = CACHE / "conformance-models" / version("transformers")
    os.environ["HF_HOME"] = str(models)  # before transformers is imported
    write_tiny_models(models)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    if "compile" in suites:
        os.environ["PEFT_DEBUG_WITH_TORCH_COMPILE"] = "1"


def main(argv=None):
    options, rest = parse(argv)
    try:
        tests = fetch_peft_tests(CACHE)
    except RuntimeError as error:
        print(f"conformance: {error}", file=sys.stderr)
        if options.quick:
            print("conformance: NOT RUN, PEFT's tests are not here; a network is needed once.")
        return 0 if options.quick else 1
    lacking = [suite for suite in options.suites if not (tests / SUITES[suite]).is_file()]
    if lacking:
        print(f"conformance: this release of PEFT has no suite {', '.join(lacking)}.")
    if "vision" in options.suites and find_spec("torchvision") is None:
        print("conformance: no suite vision, which needs torchvision.")
        lacking.append("vision")
    if "params" in options.suites and int(version("transformers").partition(".")[0]) < 5:
        print("conformance: no suite params, whose experts need transformers 5.")
        lacking.append("params")
    options.suites = [suite for suite in options.suites if suite not in lacking]
    set_environment(options.suites)
    root = view(tests)
    try:
        files = [str(root / "tests" / SUITES[suite]) for suite in options.suites]
        arguments = ["-p", "peft_plugin", "--rootdir", str(root), "-c", str(root / "pytest.ini")]
        return int(pytest.main([*arguments, "-q", "--tb=short", *files, *rest]))
    finally:
        shutil.rmtree(root, ignore_errors=True)


if __name__ == "__main__":
    raise SystemExit(main())
