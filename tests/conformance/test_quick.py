"""PEFT's own tests on our method, those that need no models; `make conformance` runs all."""

import re
import subprocess
import sys

import pytest

from tests.forks import ROOT


@pytest.mark.slow
@pytest.mark.parametrize(("suite", "at_least"), [("custom", 1000), ("config", 20)])
def test_tests_of_peft(suite, at_least):
    command = [sys.executable, "tests/conformance/run.py", "--quick", "--suites", suite]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if "NOT RUN" in done.stdout:
        pytest.skip("PEFT's tests are not here; a network is needed once")
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) >= at_least
