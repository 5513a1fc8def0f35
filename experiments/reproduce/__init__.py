"""The paper's tables and figures beside what is found here: `python -m experiments.reproduce`."""

import logging

# Imported by PEFT where it is installed; says that it lacks kernels nobody here asked for.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
