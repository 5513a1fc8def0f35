import os
import subprocess
import sys
import types

import pytest

from pacatune.cli.entry import COMMANDS, main


def install_command(monkeypatch, run, name="inspect"):
    module = types.ModuleType(f"pacatune.cli.{name}")
    module.run = run
    monkeypatch.setitem(sys.modules, f"pacatune.cli.{name}", module)


def raising(error):
    def run(argv):
        raise error

    return run


def test_help_lists_every_command(capsys):
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(f"  {name} " in out for name in COMMANDS)


def test_no_command_prints_help_and_fails(capsys):
    assert main([]) == 2
    assert "commands:" in capsys.readouterr().out


def test_version(capsys):
    from importlib.metadata import version

    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"pacatune {version('pacatune')}\n"


def test_unknown_command_suggests_the_nearest(capsys):
    assert main(["trian"]) == 2
    assert "unknown command 'trian'; did you mean 'train'?" in capsys.readouterr().err


def test_unknown_command_without_a_near_one_lists_all(capsys):
    assert main(["zzzzzz"]) == 2
    assert "choose from train, train-image, generate" in capsys.readouterr().err


def test_unknown_option(capsys):
    assert main(["--verbos"]) == 2
    assert "unknown option '--verbos'" in capsys.readouterr().err


def test_command_gets_its_words_and_gives_the_status(monkeypatch):
    seen = []
    install_command(monkeypatch, lambda argv: seen.append(argv) or 7)
    assert main(["inspect", "folder", "--x"]) == 7
    assert seen == [["folder", "--x"]]


@pytest.mark.parametrize(
    "error",
    [
        ValueError("bad\n  value"),
        TypeError("bad value"),
        ImportError("bad value"),
        FileNotFoundError("bad value"),
        FileExistsError("bad value"),
    ],
)
def test_user_errors_are_one_line(monkeypatch, capsys, error):
    install_command(monkeypatch, raising(error))
    assert main(["inspect"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("pacatune: error: bad value")
    assert err.count("\n") == 1


def test_errors_from_elsewhere_say_where(monkeypatch, capsys):
    install_command(monkeypatch, raising(ValueError("bad value")))
    assert main(["inspect"]) == 2
    assert "(ValueError; `pacatune --debug COMMAND" in capsys.readouterr().err


def test_debug_shows_the_traceback(monkeypatch, capsys):
    install_command(monkeypatch, raising(ValueError("bad value")))
    assert main(["--debug", "inspect"]) == 2
    assert "Traceback (most recent call last)" in capsys.readouterr().err


def test_interrupt(monkeypatch, capsys):
    install_command(monkeypatch, raising(KeyboardInterrupt()))
    assert main(["inspect"]) == 130
    assert "interrupted" in capsys.readouterr().err


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


def test_defects_keep_their_traceback(monkeypatch):
    install_command(monkeypatch, raising(RuntimeError("a defect")))
    with pytest.raises(RuntimeError, match="a defect"):
        main(["inspect"])


@pytest.mark.parametrize("module", ["pacatune", "pacatune.cli"])
def test_help_imports_no_torch(module):
    code = (
        "import runpy, sys\n"
        f"sys.argv = [{module!r}, '--help']\n"
        f"try: runpy.run_module({module!r}, run_name='__main__', alter_sys=True)\n"
        "except SystemExit as end: assert not end.code\n"
        "heavy = {'torch', 'transformers', 'peft', 'trl', 'datasets'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "usage: pacatune" in done.stdout
