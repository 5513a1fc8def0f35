"""Fixtures of the command tests, and how a command is run."""

import subprocess
import sys

import pytest

from pacatune.cli import main
from tests.adapters.fixtures import (
    adapter_copy,
    adapter_dir,
    lora_dir,
    model_copy,
)

__all__ = ["adapter_copy", "adapter_dir", "lora_dir", "model_copy"]


@pytest.fixture
def shown(capsys):
    """Run a command that succeeds; return what it prints."""

    def run(*words):
        capsys.readouterr()
        assert main([str(word) for word in words]) == 0
        return capsys.readouterr().out

    return run


@pytest.fixture
def refused(capsys):
    """Run a command that is refused; return the one line that it says."""

    def run(*words):
        capsys.readouterr()
        assert main([str(word) for word in words]) == 2
        said = capsys.readouterr().err
        assert said.startswith("pacatune: error: ")
        assert said.count("\n") == 1
        return said.removeprefix("pacatune: error: ").strip()

    return run


def run_without(modules, words):
    """Run a command in a new process, which may not import some modules; return how it ended."""
    code = (
        "import sys; from pacatune.cli import main\n"
        f"status = main(); found = [name for name in {modules!r} if sys.modules.get(name)]\n"
        "sys.exit(f'imported {found}' if found else status)\n"
    )
    argv = [sys.executable, "-c", code, *words]
    return subprocess.run(argv, capture_output=True, text=True, check=False)
