import pytest

from pacatune.cli.entry import main
from pacatune.cli.evaluate import SUBCOMMANDS


def test_help_lists_every_evaluation(capsys):
    assert main(["evaluate", "--help"]) == 0
    out = capsys.readouterr().out
    assert all(f"  {name} " in out for name in SUBCOMMANDS)


def test_no_evaluation_prints_help_and_fails(capsys):
    assert main(["evaluate"]) == 2
    assert "what:" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("mlmu", "unknown evaluation 'mlmu'; did you mean 'mmlu'?"),
        ("zzzz", "choose from mmlu, mmlu-data, lm-eval"),
        ("--model", "unknown option '--model'"),
    ],
)
def test_unknown_evaluation(capsys, word, message):
    assert main(["evaluate", word]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("name", SUBCOMMANDS)
def test_evaluation_gets_its_words_and_gives_the_status(monkeypatch, name):
    seen = []
    monkeypatch.setitem(SUBCOMMANDS, name, (lambda argv: seen.append(argv) or 7, ""))
    assert main(["evaluate", name, "--x"]) == 7
    assert seen == [["--x"]]
