"""What a reader sees."""

import io

import numpy as np
import pytest
from rich.console import Console

from pacatune.evaluation.mt_bench.judging import Judgment
from pacatune.evaluation.mt_bench.report import draw_radar, make_table, print_result, to_markdown


def result(**changes):
    ones = [
        *judgments("writing", [(7, 8), (9, None)]),
        *judgments("math", [(1, 2), (3, 4)]),
        *judgments("stem", [(None, None)]),
    ]
    return {
        "model_id": "tiny+my_adapter",
        "judge": {
            "model": "gpt-4o-mini",
            "models": ["gpt-4o-mini-2024"],
            "temperatures": [0],
            "url": "https://a/v1",
        },
        "sources": {"questions": "q.jsonl", "references": "r", "judge_prompts": "p"},
        "num_resamples": 10_000,
        "seed": 3,
        "cut_off": {"context": 2},
        "failures": [{"question_id": n, "turn": 1, "problem": "said `rm` <b>"} for n in range(12)],
        "table": make_table(ones, seed=3),
    } | changes


def shown(of):
    file = io.StringIO()
    print_result(of, Console(file=file, width=100))
    return file.getvalue()


def test_terminal_and_page_say_the_same():
    text, page = shown(result()), to_markdown(result(), "radar.png")
    assert page.startswith("# MT-Bench: tiny+my_adapter\n\n| category | turn 1 | turn 2 | both |")
    assert "\n| writing | 8.00 | 8.00 | 8.00 | 7.50 to 9.00 | 2 | 3 | 1 |\n" in page
    assert "\n| stem | - | - | - | - | 1 | 0 | 2 |\n" in page
    assert "![scores by category](radar.png)" in page
    for row in ("writing", "all"):
        cells = next(line for line in page.splitlines() if line.startswith(f"| {row} "))
        line = next(line for line in text.splitlines() if line.startswith(f"{row} "))
        assert line.split() == cells.replace("|", " ").split()
    for words in (
        "Judge: gpt-4o-mini, which says it is gpt-4o-mini-2024, at https://a/v1. Scores depend on",
        "only those of the same judge, prompts and references compare",
        "10,000 resamples of the questions (seed 3)",
        "2 turns cut off by the model's context",
        "12 turns have no score; no mean counts them",
        "and 2 more, in the JSON file",
    ):
        assert words in text
        assert words in page.replace("\\", "")


def test_a_judge_that_chose_its_temperature_is_said_to():
    words = "The judge knows no temperature"
    assert words not in shown(result())
    judge = result()["judge"] | {"temperatures": [None]}
    assert words in shown(result(judge=judge))


def test_what_a_judge_wrote_is_no_markup():
    assert r"said \`rm\` \<b\>" in to_markdown(result(), None)
    assert "said `rm` <b>" in shown(result())
    assert "[bold]x" in shown(
        result(failures=[{"question_id": 1, "turn": 2, "problem": "[bold]x"}])
    )


def test_the_radar_needs_three_categories_with_a_score(tmp_path):
    table = result()["table"]
    assert not draw_radar(table, "title", tmp_path / "a.png")
    ones = [line for name in ("math", "stem", "coding") for line in judgments(name, [(5, None)])]
    table = make_table(ones)
    assert draw_radar(table, "title", tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_what_is_drawn(tmp_path, monkeypatch):
    import matplotlib.figure

    drawn = []

    def save(figure, path, **options):
        drawn.append(figure.axes[0])

    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", save)
    ones = [
        *judgments("math", [(5, 7)]),
        *judgments("stem", [(2, None)]),
        *judgments("coding", [(1, 9)]),
    ]
    draw_radar(make_table(ones), "title", tmp_path / "a.png")
    (axes,) = drawn
    lines = {line.get_label(): list(line.get_ydata()) for line in axes.get_lines()}
    assert lines["both turns"] == [6, 5, 2, 6]
    assert lines["turn 1"] == [5, 1, 2, 5]
    assert lines["turn 2"][:2] == [7, 9]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["math", "coding", "stem"]
    assert axes.get_ylim() == (0, 10)


def judgments(category, scores, start=0):
    """Two turns per question; None is a failure."""
    return [
        Judgment(
            key=f"{category}{number}{turn}",
            question_id=start + number,
            category=category,
            turn=turn,
            score=score,
        )
        for number, pair in enumerate(scores)
        for turn, score in enumerate(pair, start=1)
    ]


def test_means_by_category_and_turn():
    ones = judgments("math", [(1, 2), (3, 4)]) + judgments("writing", [(10, 8)], start=10)
    writing, math, everything = make_table(ones)
    assert (writing["name"], math["name"], everything["name"]) == ("writing", "math", "all")
    assert (math["turn_1"], math["turn_2"], math["mean"]) == (2, 3, 2.5)
    assert everything["mean"] == pytest.approx(28 / 6)
    assert (everything["num_questions"], everything["num_judged"], everything["num_failed"]) == (
        3,
        6,
        0,
    )
    assert writing["low"] is writing["high"] is None  # one question has no spread


def test_failures_are_counted_and_not_averaged():
    (math, everything) = make_table(judgments("math", [(2, None), (4, 6), (None, None)]))
    assert (math["turn_1"], math["turn_2"], math["mean"]) == (3, 6, 4)
    assert (math["num_questions"], math["num_judged"], math["num_failed"]) == (3, 3, 3)
    assert everything["low"] >= 2
    (stem, _) = make_table(judgments("stem", [(None, None), (None, None)]))
    assert (stem["turn_1"], stem["mean"], stem["low"], stem["num_judged"]) == (None, None, None, 0)


def test_the_interval_is_that_of_the_mean():
    scores = np.random.default_rng(0).integers(1, 11, size=(80, 2))
    table = make_table(judgments("stem", scores.tolist()), seed=3)
    means = scores.mean(axis=1)
    error = means.std() / 80**0.5
    assert table[-1]["low"] == pytest.approx(means.mean() - 1.96 * error, abs=0.1 * error + 0.02)
    assert table[-1]["high"] == pytest.approx(means.mean() + 1.96 * error, abs=0.1 * error + 0.02)
    assert make_table(judgments("stem", scores.tolist()), seed=3) == table
    assert make_table(judgments("stem", scores.tolist()), seed=4) != table


def test_both_turns_of_a_question_are_drawn_together():
    # The mean of each question is 5, so no resample has another mean.
    (_, everything) = make_table(judgments("stem", [(1, 9), (9, 1), (4, 6)]))
    assert (everything["low"], everything["high"]) == (5, 5)
