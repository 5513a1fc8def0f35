"""Everything is asked once, kept, and counted."""

import json
import signal
import subprocess
import sys
import time

import pytest

from pacatune.evaluation.mt_bench.client import JudgeClient, JudgeUnavailable
from pacatune.evaluation.mt_bench.judging import Judge, parse_rating
from pacatune.evaluation.mt_bench.questions import render
from tests.evaluation.mt_bench.conftest import prompt_rows, write_lines
from tests.evaluation.mt_bench.judge_server import rating_of
from tests.forks import Program, run_python


@pytest.fixture
def answers(questions):
    return {one.id: (f"first of {one.id}", "second") for one in questions}


@pytest.fixture
def make(judge, prompts, tmp_path):
    """Make a judge that goes on with the same file."""

    def make(**options):
        own = {"max_retries": 0} | {
            name: options.pop(name)
            for name in ("model", "max_retries", "max_tokens")
            if name in options
        }
        client = JudgeClient(url=judge.url, **{"model": "judge"} | own)
        path = tmp_path / "model_judgment" / "judge_single.jsonl"
        settings = {"model_id": "model-a"} | options
        return Judge(client, settings.pop("prompts", prompts), path, **settings)

    return make


def rows_of(tmp_path):
    text = (tmp_path / "model_judgment" / "judge_single.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def test_judgments_are_written_in_the_form_of_fastchat(
    make, judge, questions, answers, prompts, tmp_path
):
    progress = []
    judgments = make().judge(questions, answers, lambda *numbers: progress.append(numbers))
    assert judge.complaints == []
    assert progress[0] == (0, 16)
    assert progress[-1] == (16, 16)
    by_turn = {(one.question_id, one.turn): one for one in judgments}
    rows = rows_of(tmp_path)
    assert len(rows) == len(by_turn) == 16
    for row in rows:
        question = next(one for one in questions if one.id == row["question_id"])
        prompt = render(prompts, question, answers[question.id], row["turn"])
        assert row["user_prompt"] == prompt.user
        assert row["judge"] == ["judge", prompt.name]
        assert row["model"] == "model-a"
        assert f"[[{row['score']}]]" in row["judgment"]
        assert row["score"] == rating_of(prompt.user) == by_turn[question.id, row["turn"]].score
        assert row["tstamp"] <= time.time()


def test_nothing_is_asked_twice(make, judge, questions, answers):
    first = make().judge(questions, answers)
    again = make().judge(questions, answers)
    assert again == first
    assert len(judge.requests) == 16
    # Another answer is another question to the judge, and only that.
    answers[1] = ("first of 1", "another second")
    make().judge(questions, answers)
    assert len(judge.requests) == 17


def test_another_judge_or_prompt_is_asked_anew(make, judge, questions, answers, tmp_path):
    make().judge(questions[:1], answers)
    judge.model = "judge-2"
    make(model="judge-2").judge(questions[:1], answers)
    assert len(judge.requests) == 4
    from pacatune.evaluation.mt_bench.questions import read_prompts

    rows = prompt_rows()
    rows[0]["system_prompt"] = "Be strict."
    changed = read_prompts(write_lines(tmp_path / "other.jsonl", rows))
    make(model="judge-2", prompts=changed).judge(questions[:1], answers)
    assert len(judge.requests) == 5


def test_equal_prompts_are_asked_once(make, judge, questions):
    same = [
        questions[0],
        questions[0].__class__(id=99, category="writing", turns=questions[0].turns),
    ]
    judgments = make().judge(same, {one.id: ("a", "b") for one in same})
    assert len(judge.requests) == 2
    assert [one.score for one in judgments[:2]] == [one.score for one in judgments[2:]]


@pytest.mark.parametrize("misdeed", ["nonsense", "eleven", "silent"])
def test_nonsense_is_asked_again_and_then_a_failure(
    make, judge, questions, answers, tmp_path, misdeed
):
    judge.misdeeds.extend([misdeed] * 2)
    (first, _) = make(parallel=1).judge(questions[:1], answers)
    assert first.score is not None
    assert len(judge.requests) == 4
    assert [row["score"] for row in rows_of(tmp_path)][:2] == [-1, -1]

    judge.misdeeds.extend([misdeed] * 3)
    (first, second) = make(parallel=1).judge(questions[1:2], answers)
    assert (first.score, second.score is not None) == (None, True)
    assert first.problem.startswith("no rating from 1 to 10 in 3 replies; the last: ")
    assert len(judge.requests) == 8
    # They are paid for as well: only someone who wants more attempts asks again.
    assert make(parallel=1).judge(questions[1:2], answers) == [first, second]
    assert len(judge.requests) == 8
    (first, _) = make(parallel=1, max_attempts=4).judge(questions[1:2], answers)
    assert first.score is not None
    assert len(judge.requests) == 9


def test_a_reply_that_was_cut_off_is_said_to_be(make, judge, questions, answers):
    judge.misdeeds.append("long")
    (first, _) = make(parallel=1, max_attempts=1).judge(questions[:1], answers)
    assert first.problem.endswith(
        "let me say' was cut off at 2048 tokens; raise --judge-max-tokens"
    )
    assert make(max_attempts=1).judge(questions[:1], answers)[0] == first
    assert len(judge.requests) == 2
    # With more tokens, only that turn is asked again.
    judge.max_tokens = 4096
    (again, _) = make(max_attempts=1, max_tokens=4096).judge(questions[:1], answers)
    assert again.score is not None
    assert len(judge.requests) == 3
    assert judge.complaints == []


def test_the_temperature_of_a_judge_that_takes_none_is_said(make, judge, questions, answers):
    judge.reasons = True
    first = make()
    keys = {one.key for one in first.judge(questions[:1], answers)}
    assert first.used(keys)["temperatures"] == make().used(keys)["temperatures"] == [None]
    assert judge.complaints == []


def test_a_refused_prompt_is_a_failure_and_not_remembered(make, judge, questions, answers):
    judge.misdeeds.extend(["none", (400, {}, {"message": "content filter"})])
    (_, second) = make(parallel=1).judge(questions[:1], answers)
    assert second.score is None
    assert second.problem == "the judge refuses the prompt: 400: content filter"
    (_, second) = make().judge(questions[:1], answers)
    assert second.score is not None
    assert len(judge.requests) == 3


def test_a_judge_that_refuses_everything_is_an_error(make, judge, questions, answers):
    judge.misdeeds.extend([(400, {}, {"message": "no such parameter"})] * 16)
    with pytest.raises(ValueError, match=r"refused all of 5 requests \(400: no such param"):
        make(parallel=1).judge(questions, answers)
    assert len(judge.requests) == 5


def test_a_judge_that_goes_down_keeps_what_is_paid(make, judge, questions, answers, tmp_path):
    judge.misdeeds.extend([*["none"] * 5, *[(503, {}, {})] * 20])
    message = (
        r"gives no answer: 503: Service Unavailable\. 5 replies are kept in .*judge_single.jsonl "
        r"\(of 16 .*run the same command again"
    )
    with pytest.raises(JudgeUnavailable, match=message):
        make(parallel=3).judge(questions, answers)
    assert len(rows_of(tmp_path)) == 5
    judge.misdeeds.clear()
    num_before = len(judge.requests)
    assert all(one.score for one in make().judge(questions, answers))
    assert len(judge.requests) - num_before == 11


def test_what_is_under_way_is_kept_after_an_interrupt(make, judge, questions, answers, tmp_path):
    judge.delay_s = 0.2

    def interrupt(done, total):
        if done == 2:
            raise KeyboardInterrupt

    said = []
    with pytest.raises(KeyboardInterrupt, match=r"interrupted; \d+ replies are kept in "):
        make(parallel=2, say=said.append).judge(questions, answers, interrupt)
    assert said == ["stopping; the replies to requests under way are waited for and kept"]
    assert 2 < len(rows_of(tmp_path)) == len(judge.requests) < 8


def test_requests_run_in_parallel_up_to_the_limit(make, judge, questions, answers):
    judge.delay_s = 0.05
    make(parallel=3).judge(questions, answers)
    assert judge.most_at_once == 3


def test_a_full_disk_ends_the_run(make, judge, questions, answers, monkeypatch):
    def fail(self, row):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pacatune.files.json_lines.JsonLines.append", fail)
    with pytest.raises(OSError, match="No space left"):
        make(parallel=1).judge(questions, answers)
    assert len(judge.requests) == 1


def test_scores_come_from_the_judgments_and_foreign_rows_do_not_count(
    make, judge, questions, answers, tmp_path
):
    make().judge(questions[:1], answers)
    path = tmp_path / "model_judgment" / "judge_single.jsonl"
    rows = rows_of(tmp_path)
    expected = [row["score"] for row in sorted(rows, key=lambda row: row["turn"])]
    foreign = {"question_id": 1, "model": "model-a", "score": 9, "turn": 1}
    write_lines(path, [foreign, *({**row, "score": 99} for row in rows)])
    resumed = make()
    assert resumed.notes == [f"{path}: 1 judgments are not pacatune's and do not count."]
    assert [one.score for one in resumed.judge(questions[:1], answers)] == expected
    assert len(judge.requests) == 2


def test_tokens_and_models_are_added_up(make, questions, answers):
    judge = make()
    judgments = judge.judge(questions[:2], answers)
    assert judge.used({one.key for one in judgments}) == {
        "models": ["judge-2026-01-01"],
        "temperatures": [0],
        "num_replies": 4,
        "prompt_tokens": 400,
        "completion_tokens": 40,
    }
    assert judge.used({judgments[0].key})["num_replies"] == 1


def test_judging_loads_no_model_code():
    code = (
        "import sys, pacatune.cli.evaluate, pacatune.evaluation.mt_bench; "
        "sys.exit(bool({'peft', 'transformers'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.fixture
def command(judge, files, tmp_path):
    """The command that judges the answers of somebody else, in a process of its own."""
    judge.delay_s = 0.1
    words = ["--output", str(tmp_path / "out"), "--judge-url", judge.url, "--judge-model", "judge"]
    for name, path in files.items():
        words += [f"--{name}", str(path)]
    words += ["--judge-parallel", "2"]
    code = "import sys; from pacatune.cli import main; sys.exit(main(sys.argv[1:]))"
    return [code, "evaluate", "mt-bench", *words]


def end_after(num_rows, command, path, number):
    """Send a signal once so many judgments are there; return what was said and the status."""
    program = Program(*command)
    deadline = time.monotonic() + 60
    while not (path.exists() and path.read_bytes().count(b"\n") >= num_rows):
        assert program.is_alive()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    program.send_signal(number)
    done = program.wait()
    return done.stderr, done.returncode


def test_a_terminated_run_keeps_what_was_under_way(judge, command, tmp_path):
    path = tmp_path / "out" / "model_judgment" / "judge_single.jsonl"
    said, status = end_after(4, command, path, signal.SIGTERM)
    assert status == 130
    num_kept = path.read_bytes().count(b"\n")
    assert f"pacatune: interrupted; {num_kept} replies are kept in {path}" in said
    assert 4 <= num_kept == len(judge.requests) < 16


def test_a_killed_run_loses_only_what_was_under_way(judge, command, tmp_path):
    path = tmp_path / "out" / "model_judgment" / "judge_single.jsonl"
    end_after(4, command, path, signal.SIGKILL)
    num_kept = path.read_bytes().count(b"\n")
    assert 4 <= num_kept < 16
    assert json.loads((tmp_path / "out" / "mt_bench.json").read_text()) == {"finished": False}
    with path.open("ab") as file:
        file.write(b'{"question_id": 1, "jud')  # as if the kill had come while it wrote
    time.sleep(0.3)  # the server finishes what it was asked
    num_asked = len(judge.requests)
    assert num_asked <= num_kept + 2
    judge.delay_s = 0
    result = run_python(*command)
    assert result.returncode == 0, result.stderr
    assert len(judge.requests) - num_asked == 16 - num_kept
    assert judge.complaints == []
    table = json.loads((tmp_path / "out" / "mt_bench.json").read_text())["table"]
    assert table[-1]["num_judged"] == 16


@pytest.mark.parametrize(
    ("text", "rating"),
    [
        ("Fine. Rating: [[7]]", 7),
        ("[[7.5]]", 7.5),
        ("[[10]]", 10),
        ("[[8.]]", 8),
        ("first [[3]], then [[9]]", 3),
        ("[2] but [[6]]", 6),
        ("Rating: [4]", 4),
        ("[[0]]", None),
        ("[[11]]", None),
        ("[[10.5]]", None),
        ("[[-3]]", None),
        ("[[rating]]", None),
        ("Rating: 5", None),
        ("", None),
        ("<think>[[3]], or rather [[4]]</think>\nRating: [[5]]", 5),
        ("\n<think>Could be [[3]]", None),
        ("It wrote <think>. [[6]]", 6),
        ("[[" + "9" * 400 + "]]", None),
    ],
)
def test_rating(text, rating):
    found = parse_rating(text)
    assert found == rating
    assert type(found) is type(rating)
