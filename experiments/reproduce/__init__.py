"""The paper's tables and figures beside what is found here: `python -m experiments.reproduce`."""
