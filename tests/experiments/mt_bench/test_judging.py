"""Everything is asked once, kept, and counted."""

import time
import traceback

import pytest
from rich.console import Console

from experiments.mt_bench.config import MtBenchConfig
from experiments.mt_bench.judging import Judge, parse_rating
from experiments.mt_bench.questions import render
from tests.experiments.mt_bench.conftest import read_lines, write_lines
from tests.experiments.mt_bench.fake_judge import URL, rating_of

KEY = "sk-secret-0123456789"


@pytest.fixture
def path(tmp_path):
    return tmp_path / "model_judgment" / "judge_single.jsonl"


@pytest.fixture
def turns(prompts, questions):
    return [
        render(prompts, one, (f"first of {one.id}", "second"), number, "judge")
        for one in questions
        for number in (1, 2)
    ]


@pytest.fixture
def ask(judge, path, monkeypatch):
    """Judge turns, going on with the same file; `ask.judge` has judged them."""
    monkeypatch.setenv("JUDGE_KEY", f" {KEY}\n")
    monkeypatch.setenv("OPENAI_API_KEY", "sk-other")

    def ask(turns, **options):
        given = {"judge_url": URL, "judge_model": "judge", "judge_retries": 0}
        given |= {"output": "", "questions": "", "model": "model-a"} | options
        ask.judge = Judge(MtBenchConfig(**given), path)
        return ask.judge.judge(turns, Console(quiet=True))

    return ask


def test_judgments_are_written_in_the_form_of_fastchat_once(ask, judge, turns, path):
    judge.delay_s = 0.02
    judgments = ask(turns, judge_parallel=3)
    assert judge.complaints == []
    assert judge.most_at_once == 3
    # A key that was not named is not sent.
    assert {headers["authorization"] for headers, _ in judge.requests} == {"Bearer no-key"}
    by_turn = {(one["question_id"], one["turn"]): one["score"] for one in judgments}
    rows = {(row["question_id"], row["turn"]): row for row in read_lines(path)}
    assert len(rows) == len(by_turn) == 16
    for turn in turns:
        row = rows[turn.question.id, turn.number]
        assert row["user_prompt"] == turn.user
        assert row["judge"] == ["judge", turn.prompt_name]
        assert row["model"] == "model-a"
        assert f"[[{row['score']}]]" in row["judgment"]
        assert row["score"] == rating_of(turn.user) == by_turn[turn.question.id, turn.number]
        assert row["tstamp"] <= time.time()
    assert ask.judge.used({turn.key for turn in turns[:4]}) == {
        "models": ["judge-2026-01-01"],
        "temperatures": ["0.0"],
        "prompt_tokens": 400,
        "completion_tokens": 40,
    }
    # Nothing is asked twice, and scores come from the judgments: foreign rows do not count.
    assert ask(turns) == ask([*turns, *turns])[:16] == judgments
    foreign = {"question_id": 1, "model": "model-a", "score": 9, "turn": 1}
    write_lines(path, [foreign, *({**row, "score": 99} for row in read_lines(path))])
    assert ask(turns) == judgments
    assert len(judge.requests) == 16
    # A line that a kill cut off is asked for again, and as often as is said.
    path.write_bytes(path.read_bytes()[:-10])
    judge.misdeeds.extend([(503, {}), "cut"])
    assert ask(turns, judge_retries=2) == ask(turns) == judgments
    assert len(judge.requests) == 19


@pytest.mark.parametrize("misdeed", ["nonsense", "eleven", "silent"])
def test_nonsense_is_asked_again_and_then_a_failure(ask, judge, turns, path, misdeed):
    judge.misdeeds.extend([misdeed] * 2)
    assert ask(turns[:1])[0]["score"] is not None
    assert [row["score"] for row in read_lines(path)][:2] == [-1, -1]
    judge.misdeeds.extend([misdeed] * 3)
    (failed,) = ask(turns[2:3])
    assert failed["score"] is None
    assert failed["problem"].startswith("no rating from 1 to 10; the last reply: ")
    # They are paid for as well: only someone who wants more attempts asks again.
    assert ask(turns[2:3]) == [failed]
    assert len(judge.requests) == 6
    assert ask(turns[2:3], judge_attempts=4)[0]["score"] is not None
    assert len(judge.requests) == 7


def test_a_reply_that_was_cut_off_is_asked_for_again_with_more_tokens(ask, judge, turns):
    judge.misdeeds.append("long")
    (first,) = ask(turns[:1], judge_attempts=1)
    assert first["problem"].endswith("let me say' was cut off; raise --judge-max-tokens")
    assert ask(turns[:1], judge_attempts=1) == [first]
    judge.max_tokens = 4096
    assert ask(turns[:1], judge_attempts=1, judge_max_tokens=4096)[0]["score"] is not None
    assert len(judge.requests) == 2
    assert judge.complaints == []


def test_a_reasoning_judge_is_asked_in_its_words(ask, judge, turns):
    judge.reasons = True
    assert all(one["score"] for one in ask(turns[:4], judge_parallel=1))
    assert judge.complaints == []
    assert len(judge.requests) == 6  # two refusals, and what they taught is remembered
    assert ask.judge.used({turns[0].key})["temperatures"] == ["None"]


@pytest.mark.parametrize("status", [400, 413, 422])
def test_a_refused_prompt_is_a_failure_and_not_remembered(ask, judge, turns, status):
    judge.misdeeds.append((status, {"message": "too\nlong: max_completion_tokens"}))
    (failed, other) = ask(turns[:2], judge_parallel=1)
    assert other["score"] is not None
    assert failed["problem"].startswith("the judge refuses the prompt: Error code: ")
    assert ask(turns[:1])[0]["score"] is not None
    assert len(judge.requests) == 3


@pytest.mark.parametrize(
    ("misdeed", "options", "message"),
    [
        ("hang", {}, r"gives no answer \(Request timed out.*go on later"),
        ("html", {}, r"gives no answer \(something else than an OpenAI-compatible reply"),
        ((404, {"message": "not here"}), {}, r"not here.*check --judge-url \(it usually ends in"),
        ((500, {"message": f"{KEY} is out of order"}), {}, r"\*\*\* is out of order"),
        ("gone", {}, r"judge.test/v1 gives no answer \(Connection error.*nobody there"),
        ("another key", {}, r"refuses the key; name its variable: --judge-k"),
        ("", {"judge_key_env": KEY}, "names a variable that is not set"),
    ],
)
def test_a_judge_that_gives_no_answer(ask, judge, turns, misdeed, options, message):
    """What is said never shows a key, not even in part or in the place of its name."""
    judge.misdeeds.append(misdeed)
    judge.key = "another" if misdeed == "another key" else None
    with pytest.raises((OSError, ValueError), match=message) as caught:
        ask(turns[:1], **{"judge_timeout_s": 0.3, "judge_key_env": "JUDGE_KEY"} | options)
    assert "sk-" not in "".join(traceback.format_exception_only(caught.value))


RATINGS = {"Fine. Rating: [[7]]": 7, "[[7.5]]": 7.5, "[[10]]": 10, "[[8.]]": 8, "Rating: [4]": 4}
RATINGS |= {"first [[3]], then [[9]]": 3, "[2] but [[6]]": 6, "It wrote <think>. [[6]]": 6}
RATINGS |= {"<think>[[3]], or rather [[4]]</think>\nRating: [[5]]": 5}
RATINGS |= dict.fromkeys(("[[0]]", "[[11]]", "[[-3]]", "[[rating]]", "Rating: 5", ""))
RATINGS |= dict.fromkeys(("\n<think>Could be [[3]]", "[[" + "9" * 400 + "]]"))


@pytest.mark.parametrize("text", RATINGS)
def test_rating(text):
    found = parse_rating(text)
    assert (found, type(found)) == (RATINGS[text], type(RATINGS[text]))
