"""What all commands share: help, the words and status of each, and errors in one line."""

import os
import subprocess
import sys
import types
from dataclasses import dataclass
from importlib.metadata import version

import pytest

from pacatune.cli import patch
from pacatune.cli.entry import COMMANDS, main


@pytest.fixture
def inspect(monkeypatch):
    """Make `inspect` a command that raises an error, or gives a status to its options."""

    def install(result):
        @dataclass
        class Command:
            """Do nothing."""

            folder: str = ""
            x: bool = False

            def run(self):
                if isinstance(result, BaseException):
                    raise result
                return result[self.folder, self.x]

        module = types.ModuleType("pacatune.cli.inspect")
        module.command = Command
        monkeypatch.setitem(sys.modules, "pacatune.cli.inspect", module)

    return install


@pytest.mark.parametrize(
    ("words", "commands"),
    [([], COMMANDS), (["patch"], patch.SUBCOMMANDS)],
)
def test_help_lists_every_command(words, commands, capsys, shown):
    for more, status in (["--help"], 0), ([], 2):
        assert main([*words, *more]) == status
        out = capsys.readouterr().out
        assert all(f"  {name} " in out for name in commands)
    assert shown("--version") == f"pacatune {version('pacatune')}\n"


def test_a_command_gets_its_words_and_gives_the_status(inspect):
    inspect({("a", True): 7})
    assert main(["inspect", "--folder", "a", "--x"]) == 7


@pytest.mark.parametrize(
    "kind", [ValueError, TypeError, ImportError, FileNotFoundError, FileExistsError]
)
def test_user_errors_are_one_line(inspect, refused, kind):
    inspect(kind("bad\n  value"))
    said = refused("inspect")
    assert said.startswith(f"bad value ({kind.__name__}; `pacatune --debug COMMAND")  # from where


def test_other_ends(inspect, capsys):
    inspect(ValueError("bad value"))
    assert main(["--debug", "inspect"]) == 2
    assert "Traceback (most recent call last)" in capsys.readouterr().err
    inspect(KeyboardInterrupt())
    assert main(["inspect"]) == 130
    assert "interrupted" in capsys.readouterr().err
    inspect(RuntimeError("a defect"))
    with pytest.raises(RuntimeError, match="a defect"):
        main(["inspect"])


@pytest.mark.parametrize("words", [["--help"], ["inspect", "--help"], ["nothing"]])
def test_a_reader_that_leaves_ends_the_command_quietly(words):
    """As `| head`, which may be gone before the first line is written."""
    command = [sys.executable, "-m", "pacatune", *words]
    reader, writer = os.pipe()
    os.close(reader)
    errors = subprocess.PIPE if words != ["nothing"] else writer
    with os.fdopen(writer, "w") as pipe:
        env = os.environ | {"PYTHONUNBUFFERED": ""}  # the output is written at the end
        done = subprocess.run(command, stdout=pipe, stderr=errors, text=True, env=env)
    assert done.returncode == 141
    assert not done.stderr


def test_hyphens_and_underscores_are_one_spelling(capsys):
    for command, option in (("generate", "max_new_tokens"), ("train", "training.max_steps")):
        said = []
        for name in (option, option.replace("_", "-")):
            assert main([command, f"--{name}", "many"]) == 2
            said.append(capsys.readouterr().err)
        assert said[0] == said[1]
        assert "many" in said[0]
    assert main(["train", "--model.path=./x-y", "--data.path", "d-e.jsonl"]) == 2  # values stay
    assert "x-y" in capsys.readouterr().err
