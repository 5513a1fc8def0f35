"""Beside the package, and not installed with it: the paper, reproduced; MT-Bench."""
