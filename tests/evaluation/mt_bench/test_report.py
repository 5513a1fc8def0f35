"""What a reader sees."""

import io

from rich.console import Console

from pacatune.evaluation.mt_bench.report import draw_radar, make_table, print_result, to_markdown
from tests.evaluation.mt_bench.test_score import judgments


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
