"""Run PEFT's run.py with pacatune imported: python run_with_pacatune.py -v experiments/..."""

import runpy
import sys
from pathlib import Path

import pacatune  # noqa: F401  (makes PaCA known to PEFT)

if __name__ == "__main__":
    script = Path(__file__).with_name("run.py")
    sys.argv[0] = str(script)
    runpy.run_path(str(script), run_name="__main__")
