"""Beside the package, and not installed with it: the paper, reproduced; MMLU; MT-Bench."""
