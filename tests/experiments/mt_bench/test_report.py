"""What a reader sees."""

import numpy as np
import pytest

from experiments.mt_bench.report import make_table, to_markdown


def judgments(category, scores, start=0):
    """Two turns per question; None is a failure."""
    return [
        {"question_id": start + number, "category": category, "turn": turn, "score": score}
        for number, pair in enumerate(scores)
        for turn, score in enumerate(pair, start=1)
    ]


def test_page():
    ones = [
        *judgments("writing", [(7, 8), (9, None)]),
        *judgments("math", [(1, 2), (3, 4)]),
        *judgments("stem", [(None, None)]),
    ]
    judge = {"model": "gpt-4o-mini", "models": ["gpt-4o-mini-2024"], "url": "https://a/v1"}
    result = {"model_id": "tiny+my_adapter", "judge": judge | {"temperatures": ["0.0"]}, "seed": 3}
    result |= {"questions": "q.jsonl", "references": None, "judge_prompts": "p"}
    failures = [{"question_id": n, "turn": 1, "problem": "silence"} for n in range(12)]
    result |= {"cut_off": {"context": 2}, "failures": failures, "table": make_table(ones, seed=3)}
    page = to_markdown(result)
    for words in (
        "# MT-Bench: tiny+my_adapter\n\n| category | turn 1 | turn 2 | both |",
        "\n| writing | 8.00 | 8.00 | 8.00 | 7.50 to 9.00 | 2 | 3 | 1 |\n",
        "\n| stem | - | - | - | - | 1 | 0 | 2 |\n",
        "Judge: gpt-4o-mini (gpt-4o-mini-2024) at https://a/v1, temperature 0.0.",
        "Turns cut off: 2 by context.",
        "12 turns have no score, and no mean counts them: silence (question 0, turn 1; all are in",
    ):
        assert words in page


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
