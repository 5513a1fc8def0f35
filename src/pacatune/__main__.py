"""Run the command line as `python -m pacatune`."""

import sys

from pacatune.cli.entry import main

sys.exit(main())
