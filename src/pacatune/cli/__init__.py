"""The `pacatune` command line; each command is one module, imported only when it runs."""

from pacatune.cli.entry import main

__all__ = ["main"]
