"""The package's names, and lm-eval around them: absent, quiet, as loud as before."""

import logging

import datasets
import lm_eval.api.task as task_module
import pytest

from pacatune import evaluation
from pacatune.evaluation import evaluate_choice, evaluate_tasks
from pacatune.evaluation.harness import quiet_lm_eval

NAMES = """ChoiceQuestion ChoiceResult Score TaskScores TextScore default_text evaluate_choice
evaluate_perplexity evaluate_tasks read_questions"""


def test_names():
    assert evaluation.__all__ == NAMES.split()


def test_without_lm_eval(monkeypatch):
    monkeypatch.setattr("pacatune.installation.find_spec", lambda name: None)
    for function, asked in ((evaluate_choice, []), (evaluate_tasks, ["arc_easy"])):
        with pytest.raises(
            ValueError, match=r"not installed \(lm_eval\): .*pip install -e '.\[eval\]'"
        ):
            function(None, None, asked)


def test_lm_eval_is_loud_again_afterwards():
    before = dict(vars(task_module))
    logger = logging.getLogger("lm_eval")
    level, has_bars = logger.level, datasets.are_progress_bars_disabled()

    def fail():
        with quiet_lm_eval():
            assert logger.level == logging.ERROR
            assert datasets.are_progress_bars_disabled()
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert (logger.level, datasets.are_progress_bars_disabled()) == (level, has_bars)
    assert vars(task_module) == before
