"""Run the command line as `python -m pacatune.cli`, for torchrun and accelerate launch."""

import sys

from pacatune.cli.entry import main

sys.exit(main())
