"""Runs test_quantized.py with torchao and HQQ, in a process of its own.

PEFT imports both wherever they are installed, which takes seconds and prints warnings; so they are
kept out of the environment of the other tests, in a folder that is filled the first time.
"""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / ".cache" / "quantizers"
PACKAGES = ("torchao==0.18.0", "hqq==0.2.8.post1", "termcolor==3.2.0")


def install():
    stamp = FOLDER / "installed"
    if not stamp.exists() or stamp.read_text() != " ".join(PACKAGES):
        pip = [sys.executable, "-m", "pip", "install", "-q", "--upgrade", "--no-deps"]
        subprocess.run([*pip, "--target", FOLDER, *PACKAGES], check=True)
        stamp.write_text(" ".join(PACKAGES))


def test_torchao_and_hqq():
    install()
    options = ["-q", "-o", "filterwarnings=ignore", "-p", "no:cacheprovider"]
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
        assert f"[{name}] PASSED" in result.stdout or " passed" in result.stdout
