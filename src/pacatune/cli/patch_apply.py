"""`pacatune patch apply`: write a patch into its base."""

from pacatune.cli.patch import run_apply


def run(argv: list[str]) -> int:
    """Run `pacatune patch apply` with the words after it; return the exit status."""
    return run_apply(argv, revert=False)
