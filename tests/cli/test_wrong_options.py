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
    assert error.startswith("unknown option --outptu; ")
    assert "did you mean '--output'?" in error or command[-1] in without


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["merge", "--dtype=bf61", "--adapter", "a", "--output", "b"],
            "`dtype` ('bf61') must be",
        ),
        (
            ["merge", "--dtype", "bfloat", "--adapter", "a", "--output", "b"],
            "`dtype` ('bfloat') must be one of auto, float32, bfloat16, float16, fp32, bf16, fp16; "
            "did you mean 'bfloat16'?",
        ),
        (
            ["generate", "--max-new-tokens", "many"],
            "max_new_tokens\": Expected a <class 'int'>. Got value: many",
        ),
        (["generate", "--promt=a"], "unknown option --promt; did you mean '--prompt'?"),
        (["inspect"], "the following arguments are required: adapter; see `pacatune inspect"),
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
