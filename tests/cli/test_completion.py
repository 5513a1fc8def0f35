"""The completion script of bash, and what the scripts of all shells are made of."""

import subprocess

import pytest

from pacatune.cli import completion, train
from pacatune.cli.entry import COMMANDS

# What is typed before the tab -> what its last word becomes.
CASES = {
    "mer": "merge",
    "patch ap": "apply",
    "merge --dtype bfl": "bfloat16",
    "merge --allow-other-base --no-v": "--no-verify",
    "train --paca.selection_b": "--paca.selection_batches",
    "train --task dp": "dpo",
    "train --training.bf16 tr": "true",
    "train --config long-n": "long-name.yaml",
    "inspect long-n": "long-name.yaml",
    "train --paca.r long-n": "",  # a number follows, which no file is
    "train-image --pres": "--preset",
}
TYPE = """
source completion
for line in "$@"; do
    read -ra COMP_WORDS <<< "pacatune $line"
    COMP_CWORD=$((${#COMP_WORDS[@]} - 1))
    _shtab_pacatune pacatune "${COMP_WORDS[COMP_CWORD]}" "${COMP_WORDS[COMP_CWORD - 1]}"
    echo "${COMPREPLY[*]}"
done
"""


@pytest.fixture
def parser():
    return completion.make_parser()


def test_bash_completes(parser, tmp_path):
    (tmp_path / "completion").write_text(parser.get_completion_script("shtab-bash"))
    (tmp_path / "long-name.yaml").touch()
    argv = ["bash", "-c", TYPE, "bash", *CASES]
    done = subprocess.run(argv, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert dict(zip(CASES, done.stdout.splitlines(), strict=True)) == CASES


def test_every_command_and_option_of_the_parsers_is_known(parser):
    commands = inner(parser)
    assert set(COMMANDS) == set(commands)
    assert "--columns" in commands["inspect"]._option_string_actions
    stack = inner(commands["patch"])["stack"]
    assert {"--patch", "--overlap"} <= set(stack._option_string_actions)
    known = {action.dest for action in commands["train"]._actions}
    for task in train.names_of_tasks():
        assert {action.dest for action in train.all_options(task).parser._actions} <= known


def inner(parser):
    (found,) = (one.choices for one in parser._actions if isinstance(one.choices, dict))
    return found
