import pytest

from pacatune.cli.entry import main
from pacatune.cli.evaluate import SUBCOMMANDS


@pytest.mark.parametrize(("words", "status"), [(["--help"], 0), ([], 2)])
def test_help_lists_every_evaluation(words, status, capsys):
    assert main(["evaluate", *words]) == status
    out = capsys.readouterr().out
    assert all(f"  {name} " in out for name in SUBCOMMANDS)


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("mlmu", "unknown command of evaluate 'mlmu'; did you mean 'mmlu'?"),
        ("zzzz", "choose from mmlu, lm-eval, choice"),
        ("--model", "unknown option '--model'"),
    ],
)
def test_unknown_evaluation(capsys, word, message):
    assert main(["evaluate", word]) == 2
    assert message in capsys.readouterr().err


def test_an_evaluation_gets_its_words_and_gives_the_status(monkeypatch):
    def score(*, number: int) -> int:
        """Score a number."""
        return number

    class Scorer:
        """Score a number."""

        def __init__(self, number: int = 1):
            self.number = number

        def run(self, command: str) -> int:
            assert command == f"pacatune evaluate mmlu --number {self.number}"
            return self.number

    for called in (score, Scorer):
        monkeypatch.setitem(SUBCOMMANDS, "mmlu", called)
        assert main(["evaluate", "mmlu", "--number", "7"]) == 7
