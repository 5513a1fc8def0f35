"""What a reader sees."""

import numpy as np
import pytest

from experiments.mt_bench.report import make_table


def judgments(category, scores, start=0):
    """Two turns per question; None is a failure."""
    return [
        {"question_id": start + number, "category": category, "turn": turn, "score": score}
        for number, pair in enumerate(scores)
        for turn, score in enumerate(pair, start=1)
    ]


def values(line, *names):
    return [line[name] for name in names]


def test_means_by_category_and_turn_count_no_failures():
    ones = judgments("math", [(1, 2), (3, 4)]) + judgments("writing", [(10, 8)], start=10)
    writing, math, everything = make_table(ones)
    assert [line["name"] for line in (writing, math, everything)] == ["writing", "math", "all"]
    assert values(math, "turn_1", "turn_2", "mean") == [2, 3, 2.5]
    assert everything["mean"] == pytest.approx(28 / 6)
    counts = ("num_questions", "num_judged", "num_failed")
    assert values(everything, *counts) == [3, 6, 0]
    assert writing["low"] is writing["high"] is None  # one question has no spread
    (math, everything) = make_table(judgments("math", [(2, None), (4, 6), (None, None)]))
    assert values(math, "turn_1", "turn_2", "mean", *counts) == [3, 6, 4, 3, 3, 3]
    assert everything["low"] >= 2
    (stem, _) = make_table(judgments("stem", [(None, None), (None, None)]))
    assert values(stem, "turn_1", "mean", "low", "num_judged") == [None, None, None, 0]


def test_the_interval_is_that_of_the_mean_and_draws_both_turns_together():
    scores = np.random.default_rng(0).integers(1, 11, size=(80, 2))
    table = make_table(judgments("stem", scores.tolist()), seed=3)
    means = scores.mean(axis=1)
    error = means.std() / 80**0.5
    expected = [means.mean() - 1.96 * error, means.mean() + 1.96 * error]
    assert values(table[-1], "low", "high") == pytest.approx(expected, abs=0.1 * error + 0.02)
    assert make_table(judgments("stem", scores.tolist()), seed=3) == table
    assert make_table(judgments("stem", scores.tolist()), seed=4) != table
    # The mean of each question is 5, so no resample has another mean.
    (_, everything) = make_table(judgments("stem", [(1, 9), (9, 1), (4, 6)]))
    assert values(everything, "low", "high") == [5, 5]
