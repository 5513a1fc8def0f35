"""Run MT-Bench: `python -m experiments.mt_bench --help`."""

import sys

from experiments.mt_bench.run import main

sys.exit(main(sys.argv[1:]))
