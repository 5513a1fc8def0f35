"""Completion scripts, in the shells that they are for."""

import os
import pty
import select
import shutil
import subprocess
import time

import pytest

from pacatune.cli import completion, main, train
from pacatune.cli.entry import COMMANDS

# What is typed before the tab, and the words of the line after it.
CASES = {
    "mer": "merge",
    "--debug mer": "--debug merge",
    "patch ap": "patch apply",
    "patch apply --pa": "patch apply --patch",
    "evaluate mt": "evaluate mt-bench",
    "merge --dtype bfl": "merge --dtype bfloat16",
    "merge --no-v": "merge --no-verify",
    "merge --allow-other-base --no-v": "merge --allow-other-base --no-verify",
    "export --to lo": "export --to lora",
    "train --paca.selection_b": "train --paca.selection_batches",
    "train --lean req": "train --lean require",
    "train --method lora_d": "train --method lora_dropout",
    "train --task dp": "train --task dpo",
    "train --training.bf16 tr": "train --training.bf16 true",
    "train --config long-n": "train --config long-name.yaml",
    "inspect long-n": "inspect long-name.yaml",
    # a number follows, which no file is
    "train --paca.r long-n": "train --paca.r long-n",
    "train --resume --ov": "train --resume --overwrite",
    "train-image --pres": "train-image --preset",
    "estimate --lean-l": "estimate --lean-level",
    "completion zs": "completion zsh",
}


@pytest.fixture
def script(tmp_path):
    """Writes the script of a shell."""

    def write(shell):
        path = tmp_path / f"completion.{shell}"
        path.write_text(completion.make_parser().get_completion_script(f"shtab-{shell}") + "\n")
        (tmp_path / "long-name.yaml").touch()
        return path

    return write


def type_into(shell, first_lines, cases, folder):
    """What `pacatune` gets from lines that are typed, each ended by a tab and Enter."""
    if shutil.which(shell[0]) is None:
        pytest.skip(f"{shell[0]} is not installed")
    terminal, inside = pty.openpty()
    env = os.environ | {"TERM": "dumb", "HOME": str(folder)}
    ends = {"stdin": inside, "stdout": inside, "stderr": inside}
    process = subprocess.Popen(shell, cwd=folder, env=env, start_new_session=True, **ends)
    os.close(inside)
    lines = [*first_lines, 'pacatune() { printf "<%s>\\n" "$*"; }', "pacatune ready"]
    shown = send(terminal, "".join(f"{line}\n" for line in lines), "<ready>")
    for typed in cases:
        shown = send(terminal, f"pacatune {typed}\t\n", ">")
        got = shown.rpartition("<")[2].partition(">")[0]
        yield typed, got.strip()
    os.write(terminal, b"exit\n")
    process.wait(60)
    os.close(terminal)


def send(terminal, text, end):
    os.write(terminal, text.encode())
    shown, deadline = "", time.monotonic() + 60
    while not shown.replace("\r", "").rstrip(" %$\n").endswith(end):
        assert time.monotonic() < deadline, shown
        if select.select([terminal], [], [], 0.05)[0]:
            shown += os.read(terminal, 65536).decode()
    return shown


def test_bash_completes(script, tmp_path):
    # Without a prompt the shown text ends with what pacatune printed.
    start = ["PS1=; bind 'set enable-bracketed-paste off'", f"source {script('bash')}"]
    found = dict(type_into(["bash", "--norc", "-i"], start, CASES, tmp_path))
    assert found == CASES


def test_zsh_completes(script, tmp_path):
    start = [
        "PS1=; unsetopt prompt_sp zle_bracketed_paste 2>/dev/null; unset zle_bracketed_paste",
        "autoload -Uz compinit; compinit -u -D; zstyle ':completion:*' insert-tab false",
        f'eval "$(cat {script("zsh")})"',
    ]
    found = dict(type_into(["zsh", "-f", "-i"], start, CASES, tmp_path))
    assert found == CASES


def test_fish_completes(script, tmp_path):
    if shutil.which("fish") is None:
        pytest.skip("fish is not installed")
    lines = [f"source {script('fish')}"]
    first = "string split -f 1 \\t | head -n 1"
    lines += [f"printf '<%s>\\n' (complete -C 'pacatune {typed}' | {first})" for typed in CASES]
    env = os.environ | {"HOME": str(tmp_path)}
    done = subprocess.run(
        ["fish", "--no-config", "-c", "\n".join(lines)],
        cwd=tmp_path,
        env=env,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stderr == ""
    last = [line.split()[-1] if line != typed else "" for typed, line in CASES.items()]
    assert done.stdout.splitlines() == [f"<{word}>" for word in last]


def test_every_command_and_option_of_the_parsers_is_known():
    commands = inner(completion.make_parser())
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


def test_another_shell_is_refused(capsys):
    assert main(["completion", "tcsh"]) == 2
    assert "('tcsh') must be one of bash, zsh, fish" in capsys.readouterr().err
