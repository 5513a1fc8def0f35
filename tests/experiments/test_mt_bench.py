"""MT-Bench, from a tiny model's answers to the table, with a judge on a local port."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from experiments import mt_bench
from tests.adapters.fixtures import save_adapter
from tests.data.conftest import write_lines

TWO = "{question_1} {answer_1} Then: {question_2} {answer_2}"
PROMPTS = {
    "single-v1": "One: {question} {answer}",
    "single-math-v1": "One: {question} {ref_answer_1} {answer}",
    "single-v1-multi-turn": TWO,
    "single-math-v1-multi-turn": "{ref_answer_1} {ref_answer_2} " + TWO,
}


class Judge(BaseHTTPRequestHandler):
    """Grades by what `server.say` makes of a request: a text, or a status and an error."""

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append((self.path, self.headers["Authorization"], body))
        said = self.server.say(body)
        status, reply = 200, {"object": "chat.completion", "id": "1", "created": 1}
        if isinstance(said, str):
            message = {"role": "assistant", "content": said}
            reply |= {"model": "judge-2026", "choices": [{"index": 0, "message": message}]}
        else:
            status, reply = said[0], {"error": {"message": said[1]}}
        content = json.dumps(reply).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_):
        pass


@pytest.fixture
def judge():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Judge)
    server.asked, server.say = [], lambda body: "It is so so. Rating: [[7]]"
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def questions(tmp_path):
    rows = [
        {"question_id": number, "category": name, "turns": [f"What is {name}?", "And {why}?"]}
        for number, name in enumerate(("writing", "math", "stem", "stem"))
    ]
    return write_lines(tmp_path / "questions.jsonl", rows), rows


@pytest.fixture
def run(tiny_model_dir, tmp_path, questions, judge, monkeypatch, capsys):
    """Run with the tiny model; return the status and what was said."""
    monkeypatch.setenv("OPENAI_API_KEY", "a-key")
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.01)
    monkeypatch.setattr("openai._base_client.MAX_RETRY_DELAY", 0.01)
    texts = {"name": list(PROMPTS), "prompt_template": list(PROMPTS.values())}
    prompts = [dict(zip(texts, row, strict=True)) for row in zip(*texts.values(), strict=True)]
    reference = {"question_id": 1, "choices": [{"turns": ["ref one", "ref two"]}]}
    usual = {
        "output": tmp_path / "out",
        "model": tiny_model_dir,
        "device": "cpu",
        "questions": questions[0],
        "references": write_lines(tmp_path / "references.jsonl", [reference]),
        "judge_prompts": write_lines(
            tmp_path / "prompts.jsonl", [{"system_prompt": "Be kind.", **row} for row in prompts]
        ),
        "judge_url": f"http://127.0.0.1:{judge.server_port}/v1",
        "max_new_tokens": 6,
        "batch_size": 2,
    }

    def run(**options):
        given = (usual | options).items()
        status = mt_bench.main([f"--{name}={value}" for name, value in given if value is not None])
        said = capsys.readouterr()
        return status, said.out + said.err

    return run


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_from_the_questions_to_the_table(run, judge, questions, tmp_path, monkeypatch):
    status, said = run()
    assert (status, said.splitlines()[-2]) == (0, "all         7.00 ± 0.00 (8 turns)")
    answers = {
        row["question_id"]: row["turns"] for row in read(tmp_path / "out/model_answer.jsonl")
    }
    assert sorted(answers) == [0, 1, 2, 3]
    sent = {body["messages"][1]["content"] for _, _, body in judge.asked}
    for row in questions[1]:
        (first, second), (one, two) = row["turns"], answers[row["question_id"]]
        references = ("ref one ", "ref one ref two ") if row["category"] == "math" else ("", "")
        assert f"One: {first} {references[0]}{one}" in sent
        assert f"{references[1]}{first} {one} Then: {second} {two}" in sent
    paths, keys, bodies = zip(*judge.asked, strict=True)
    assert {*paths} == {"/v1/chat/completions"}
    assert {*keys} == {"Bearer a-key"}
    assert all(body["messages"][0]["content"] == "Be kind." for body in bodies)
    assert {(body["model"], body["temperature"], body["max_tokens"]) for body in bodies} == {
        ("gpt-4o-mini", 0, 2048)
    }
    # The same command has nothing left to do; another judge is asked, of the same answers.
    monkeypatch.setattr(mt_bench, "load_language_model", lambda *_, **__: pytest.fail("loaded"))
    assert run() == (0, said)
    assert len(judge.asked) == 8
    options = '{"max_completion_tokens": 9}'
    assert run(judge_model="other", judge_options=options)[0] == 0
    assert len(judge.asked) == 16
    assert judge.asked[-1][2].keys() == {"model", "messages", "max_completion_tokens"}


def test_an_adapter_answers_otherwise_and_answers_do_not_mix(run, tiny_model_dir, tmp_path):
    save_adapter(tiny_model_dir, tmp_path / "adapter", r=16, paca_alpha=64)
    assert run()[0] == run(adapter=tmp_path / "adapter", output=tmp_path / "other")[0] == 0
    plain, adapted = (read(tmp_path / name / "model_answer.jsonl") for name in ("out", "other"))
    assert [row["turns"] for row in plain] != [row["turns"] for row in adapted]
    status, said = run(adapter=tmp_path / "adapter")
    assert status == 2
    assert "model_answer.jsonl has answers of {'model': '" in said


def test_what_has_no_rating_is_asked_again_and_replies_are_kept(run, judge):
    stem = "What is stem?"
    judge.say = lambda body: (400, "too long") if stem in str(body) else "Rating: [[3]]"
    status, said = run()
    assert (status, said.splitlines()[-2]) == (0, "all         3.00 ± 0.00 (4 turns)")
    judge.say = lambda body: (500, "out of order")
    status, said = run()
    assert status == 2
    assert "mt_bench: error: Error code: 500" in said
    judge.say = lambda body: "no"
    assert run(judge_model="shy")[0] == 1
    judge.say = lambda body: "[[9]]"
    before = len(judge.asked)
    assert run()[1].splitlines()[-2].split()[1:2] == ["6.00"]
    assert len(judge.asked) - before == 4


def test_mistakes_are_one_line_before_a_model_is_loaded(run, questions, tmp_path, monkeypatch):
    monkeypatch.setattr(mt_bench, "load_language_model", lambda *_, **__: pytest.fail("loaded"))
    odd = write_lines(tmp_path / "odd.jsonl", [questions[1][0] | {"category": "maths"}])
    for options, message in (
        ({"questions": "./no.jsonl"}, "./no.jsonl does not exist; check `questions`"),
        ({"questions": odd}, "needs two `turns` and a category of ['writing'"),
        ({"references": questions[0]}, "question 1 is judged by the prompt 'single-math-v1', and"),
        ({"judge_prompts": questions[0]}, "'single-v1', and 'single-v1' is missing; give FastChat"),
        ({"judge_options": "warm"}, "judge_options"),
        ({"judge_modell": "x"}, "unknown option --judge_modell; did you mean '--judge_model'"),
    ):
        status, said = run(**options)
        assert (status, said.count("\n")) == (2, 1)
        assert message in said
    monkeypatch.delenv("OPENAI_API_KEY")
    assert "OPENAI_API_KEY" in run()[1]
    assert not (tmp_path / "out").exists()


RATINGS = {"Fine. Rating: [[7]]": 7, "[[7.5]]": 7.5, "[[10]]": 10, "Rating: [4]": 4}
RATINGS |= {"first [[3]], then [[9]]": 3, "[2] but [[6]]": 6, "<think>[[3]]</think>\n[[5]]": 5}
RATINGS |= dict.fromkeys(("[[0]]", "[[11]]", "[[-3]]", "[[rating]]", "Rating: 5", ""))


@pytest.mark.parametrize("text", RATINGS)
def test_rating(text):
    assert mt_bench.rating(text) == RATINGS[text]


def test_the_interval_is_over_questions():
    turns = [{"question_id": i // 2, "category": "stem", "turn": 1 + i % 2} for i in range(6)]
    stem, everything = mt_bench.make_table(turns, [4, 6, 6, None, 8, 8])
    assert (stem["mean"], stem["num_judged"]) == (6.4, 5)
    # Student's t of two degrees of freedom, of the means 5, 6 and 8.
    assert stem["spread"] == pytest.approx(4.303 * 1.5275 / 3**0.5, rel=1e-3)
    assert everything == stem | {"category": "all"}
