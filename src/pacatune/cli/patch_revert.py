"""`pacatune patch revert`: take a patch out of a model folder again."""

from pacatune.cli.patch import run_apply


def run(argv: list[str]) -> int:
    """Run `pacatune patch revert` with the words after it; return the exit status."""
    return run_apply(argv, revert=True)
