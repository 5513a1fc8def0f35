"""Kernels without a GPU: by Triton's interpreter, and compiled for GPUs that are not here.

torch compiles by Triton on CPUs as well, where it finds it; so it is kept beside the environment of
the other tests, in the versions that residency/triton.txt lists. What runs by it is a process of
its own.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
VERSIONS = (ROOT / "tests" / "residency" / "triton.txt").read_text().splitlines()
OLDEST, NEWEST = (line for line in VERSIONS if not line.startswith("#"))
# An A100, an H100, an MI300X; a B200, which the compiler beside the oldest Triton does not know.
TARGETS = [("cuda", 80, 32), ("cuda", 90, 32), ("hip", "gfx942", 64)]
B200 = ("cuda", 100, 32)
MARKS = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="Triton's wheels are for Linux"),
]


def run(arguments, tmp_path, triton=NEWEST, **variables):
    folder = ROOT / ".cache" / "triton" / triton
    if triton == OLDEST and sys.version_info >= (3, 14):
        pytest.skip(f"Triton {triton} has no wheels for this Python")
    assert (folder / "installed").is_file(), "`make test` installs what triton.txt lists"
    path = os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])
    settings = {"PYTHONPATH": path, "TRITON_CACHE_DIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", *arguments],
        env={**os.environ, **settings, **variables},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    return done.stdout
