"""Completion scripts, in the shells that they are for."""

import os
import pty
import select
import subprocess
import time

import pytest

from pacatune.cli import completion, train
from pacatune.cli.entry import COMMANDS

# What is typed before the tab, and the words of the line after it.
CASES = {
    "mer": "merge",
    "patch ap": "patch apply",
    "merge --dtype bfl": "merge --dtype bfloat16",
    "merge --allow-other-base --no-v": "merge --allow-other-base --no-verify",
    "train --paca.selection_b": "train --paca.selection_batches",
    "train --task dp": "train --task dpo",
    "train --training.bf16 tr": "train --training.bf16 true",
    "train --config long-n": "train --config long-name.yaml",
    "inspect long-n": "inspect long-name.yaml",
    # a number follows, which no file is
    "train --paca.r long-n": "train --paca.r long-n",
    "train-image --pres": "train-image --preset",
}


@pytest.fixture
def parser():
    return completion.make_parser()


def send(terminal, text, end):
    os.write(terminal, text.encode())
    shown, deadline = "", time.monotonic() + 60
    while not shown.replace("\r", "").rstrip(" %$\n").endswith(end):
        assert time.monotonic() < deadline, shown
        if select.select([terminal], [], [], 0.05)[0]:
            shown += os.read(terminal, 65536).decode()
    return shown


def test_bash_completes(parser, tmp_path):
    """What `pacatune` gets from lines that are typed, each ended by a tab and Enter."""
    (tmp_path / "completion").write_text(parser.get_completion_script("shtab-bash"))
    (tmp_path / "long-name.yaml").touch()
    terminal, inside = pty.openpty()
    env = os.environ | {"TERM": "dumb", "HOME": str(tmp_path)}
    ends = {"stdin": inside, "stdout": inside, "stderr": inside}
    shell = ["bash", "--norc", "-i"]
    process = subprocess.Popen(shell, cwd=tmp_path, env=env, start_new_session=True, **ends)
    os.close(inside)
    # Without a prompt the shown text ends with what pacatune printed.
    lines = ["PS1=; bind 'set enable-bracketed-paste off'", "source completion"]
    lines += ['pacatune() { printf "<%s>\\n" "$*"; }', "pacatune ready"]
    send(terminal, "".join(f"{line}\n" for line in lines), "<ready>")
    found = {}
    for typed in CASES:
        shown = send(terminal, f"pacatune {typed}\t\n", ">")
        found[typed] = shown.rpartition("<")[2].partition(">")[0].strip()
    os.write(terminal, b"exit\n")
    process.wait(60)
    os.close(terminal)
    assert found == CASES


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_other_shells(parser, shell):
    script = parser.get_completion_script(f"shtab-{shell}")
    assert all(word in script for word in ("allow-other-base", "selection_batches", "to-adapter"))


def test_every_command_and_option_of_the_parsers_is_known(parser):
    commands = inner(parser)
    assert set(COMMANDS) == set(commands)
    assert "--against" in commands["inspect"]._option_string_actions
    stack = inner(commands["patch"])["stack"]
    assert {"--patch", "--overlap"} <= set(stack._option_string_actions)
    known = {action.dest for action in commands["train"]._actions}
    for task in train.names_of_tasks():
        assert {action.dest for action in train.all_options(task).parser._actions} <= known


def inner(parser):
    (found,) = (one.choices for one in parser._actions if isinstance(one.choices, dict))
    return found
