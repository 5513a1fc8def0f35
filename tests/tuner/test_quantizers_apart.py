"""Runs test_quantized.py with torchao and HQQ, in a process of its own.

PEFT imports both wherever they are installed, which takes seconds and prints warnings; so they are
kept out of the environment of the other tests: `make test` puts them into a folder beside it.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.releases import needs

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / ".cache" / "quantizers"


# Others of PEFT's backends need the package that they read.
@needs("peft", "0.21")
@pytest.mark.slow
def test_torchao_and_hqq():
    assert FOLDER.is_dir(), "`make test` installs what tests/tuner/quantizers.txt lists"
    options = ["-v", "-o", "filterwarnings=ignore", "-p", "no:cacheprovider"]
    tests = [str(Path(__file__).with_name("test_quantized.py")), "-k", "torchao or hqq"]
    result = subprocess.run(
        [sys.executable, "-m", "pytest", *options, *tests],
        env={**os.environ, "PYTHONPATH": str(FOLDER)},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout[-5000:] + result.stderr[-2000:]
    for name in ("torchao-int8", "torchao-int4", "hqq-int4"):
        assert len(re.findall(rf"\[{name}\] PASSED", result.stdout)) >= 4, name
