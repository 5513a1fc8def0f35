"""DeepSpeed in a folder beside the environment, and its operation for CPUs, built once.

accelerate imports DeepSpeed in every Trainer that finds it, so it is kept out of the environment of
the other tests: `make test` puts it into the folder, which only the processes of its own tests see.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

CACHE = Path(__file__).parents[2] / ".cache"
FOLDER, LOG, OPS = CACHE / "deepspeed", CACHE / "deepspeed.log", CACHE / "deepspeed-ops"
BUILD = "from deepspeed.comm.torch import build_shm_op; build_shm_op()"


def build():
    """Build its shared-memory operation; return the environment of processes that import it."""
    if not (FOLDER / "deepspeed").is_dir():
        why = LOG.read_text().strip().splitlines()[-1:] if LOG.exists() else []
        pytest.skip(f"DeepSpeed is not installed: {(why or ['`make test` installs it'])[0]}")
    OPS.mkdir(exist_ok=True)
    for lock in OPS.rglob("lock"):  # of a build that was killed: the next would wait for ever
        lock.unlink()
    path = f"{FOLDER / 'bin'}:{os.environ['PATH']}"
    environment = {"PYTHONPATH": str(FOLDER), "TORCH_EXTENSIONS_DIR": str(OPS), "PATH": path}
    built = subprocess.run(
        [sys.executable, "-c", BUILD],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=600,
    )
    if built.returncode:
        pytest.skip(f"DeepSpeed cannot be built: {built.stderr.strip().splitlines()[-1]}")
    return environment
