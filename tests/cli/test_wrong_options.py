"""Words that a command does not know are one line, in the same words everywhere."""

import pytest

from pacatune.cli.entry import COMMANDS, main
from pacatune.cli.evaluate import SUBCOMMANDS as EVALUATIONS
from pacatune.cli.patch import SUBCOMMANDS as PATCHES

WITH_SECTIONS = ("train", "train-image")
EVERY_COMMAND = [
    *([name] for name in COMMANDS if name not in (*WITH_SECTIONS, "evaluate", "patch")),
    *(["evaluate", name] for name in EVALUATIONS),
    *(["patch", name] for name in PATCHES),
]


def refused(capsys, *words):
    """Return the one line that a command says to words that it refuses."""
    assert main(list(words)) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("pacatune: error: ")
    assert err.count("\n") == 1
    return err.removeprefix("pacatune: error: ").strip()


@pytest.mark.parametrize("command", EVERY_COMMAND, ids=" ".join)
def test_an_option_that_there_is_not_comes_before_those_that_are_missing(command, capsys):
    error = refused(capsys, *command, "--outptu", "x")
    without = ("generate", "inspect", "bench", "estimate", "recover", "completion")
    near = "" if command[-1] in without else "--output"
    assert error.startswith("unknown option --outptu; ")
    assert f"did you mean '{near}'? See" in error or not near
    assert error.endswith(f"ee `pacatune {' '.join(command)} --help`.")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["merge", "--dtype=bf61", "--adapter", "a", "--output", "b"],
            "`--dtype` ('bf61') must be",
        ),
        (
            ["merge", "--dtype", "bfloat", "--adapter", "a", "--output", "b"],
            "`--dtype` ('bfloat') must be one of auto, float32, bfloat16, float16; did you mean "
            "'bfloat16'? See `pacatune merge --help`.",
        ),
        (["generate", "--max-new-tokens", "many"], "--max-new-tokens: invalid int value: 'many'"),
        (["generate", "--promt=a"], "unknown option --promt; did you mean '--prompt'? See"),
        (["inspect"], "the following arguments are required: ADAPTER; see `pacatune inspect"),
        (["inspect", "a", "--", "-b"], "unrecognized arguments: -b; see"),
        (["inspect", "a", "b"], "unrecognized arguments: b; see `pacatune inspect --help`."),
        (["generate", "-o", "b"], "unknown option -o; "),
    ],
)
def test_wrong_words(words, message, capsys):
    assert message in refused(capsys, *words)


def test_a_text_that_begins_with_a_hyphen_is_no_option(capsys):
    assert "--compare needs --adapter" in refused(capsys, "generate", "--prompt=-a", "--compare")
    assert "needs --adapter" in refused(capsys, "generate", "--prompt", "- a b", "--compare")
