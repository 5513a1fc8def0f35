import logging

import pytest

from pacatune.evaluation import evaluate_choice, evaluate_tasks
from pacatune.evaluation.harness import quiet_lm_eval


@pytest.mark.parametrize(
    "call",
    [
        lambda: evaluate_choice(None, None, []),
        lambda: evaluate_tasks(None, None, ["arc_easy"]),
    ],
)
def test_without_lm_eval(monkeypatch, call):
    monkeypatch.setattr("pacatune.installation.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"not installed \(lm_eval\): .*'pacatune\[eval\]'"):
        call()


def test_lm_eval_is_loud_again_afterwards():
    import datasets
    import lm_eval.api.task as task_module

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
    assert logger.level == level
    assert datasets.are_progress_bars_disabled() is has_bars
    assert vars(task_module) == before
