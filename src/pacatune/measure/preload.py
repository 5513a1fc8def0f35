"""Imported once by the server that child processes are forked from, so that they start at once."""

import logging

# Hints about optional kernels that nobody here asked for.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

import peft  # noqa: E402, F401 (imported to be there)

from pacatune import tuner  # noqa: E402, F401 (as above)
from pacatune.measure import step  # noqa: E402, F401 (as above)
