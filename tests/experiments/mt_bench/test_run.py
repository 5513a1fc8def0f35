"""From a tiny model's answers to the table, as the command line does it."""

import json

import pytest

from experiments.mt_bench import answering
from experiments.mt_bench.run import main
from tests.adapters.fixtures import save_adapter
from tests.experiments.mt_bench.conftest import answer_row, question_rows, read_lines, write_lines
from tests.experiments.mt_bench.fake_judge import URL


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


@pytest.fixture
def run(tiny_model_dir, files, judge, out, capsys):
    """Run with the tiny model; `run.out` and `run.err` hold what was said. None is no option."""
    usual = {"output": out, "model": tiny_model_dir, "device": "cpu", "max_new_tokens": 8}
    usual |= {"judge_url": URL, "judge_model": "judge", "judge_retries": 0}

    def run(**options):
        given = {k: v for k, v in (usual | files | options).items() if v is not None}
        status = main([w for k, v in given.items() for w in (f"--{k.replace('_', '-')}", str(v))])
        run.out, run.err = capsys.readouterr()
        return status

    return run


@pytest.fixture
def no_model(monkeypatch):
    monkeypatch.setattr(answering, "TextGenerator", lambda *a, **k: pytest.fail("too late"))


def result_of(out):
    return json.loads((out / "mt_bench.json").read_text())


def answers_of(out):
    (path,) = (out / "model_answer").iterdir()
    return path.stem, read_lines(path)


def answer_as_other(out):
    rows = [answer_row(row["question_id"], "first {it}", "second") for row in question_rows()]
    write_lines(out / "model_answer" / "other.jsonl", rows)


def test_from_the_questions_to_the_table(run, judge, out, tiny_model_dir, request):
    # Answers first, judgments later.
    assert run(judge_prompts=None) == 0, run.err
    assert "table" not in result_of(out)
    assert judge.requests == []
    request.getfixturevalue("no_model")
    for _ in range(2):
        assert run() == 0, run.err
        result = result_of(out)
        assert result["finished"]
        assert (result["table"][-1]["num_judged"], len(judge.requests)) == (16, 16)
    assert judge.complaints == []
    names = [line["name"] for line in result["table"]]
    assert names == ["writing", "math", "coding", "stem", "all"]
    name, answers = answers_of(out)
    assert name == tiny_model_dir.name
    judgments = read_lines(out / "model_judgment" / "judge_single.jsonl")
    assert result["table"][-1]["mean"] == pytest.approx(sum(j["score"] for j in judgments) / 16)
    # What was judged is what was answered.
    prompts = {(j["question_id"], j["turn"]): j["user_prompt"] for j in judgments}
    for row in {row["question_id"]: row for row in answers}.values():
        first, second = row["choices"][0]["turns"]
        assert first in prompts[row["question_id"], 1]
        assert first in prompts[row["question_id"], 2]
        assert second in prompts[row["question_id"], 2]
    page = (out / "mt_bench.md").read_text()
    assert "| all |" in page
    assert page in run.out


def test_an_adapter_answers_otherwise_and_does_not_mix(run, tiny_model_dir, tmp_path, out):
    save_adapter(tiny_model_dir, tmp_path / "adapter", r=16, paca_alpha=64)
    adapted = {"adapter": tmp_path / "adapter", "judge_prompts": None}
    base = {"judge_prompts": None, "output": tmp_path / "base"}
    assert run(**base) == run(**adapted) == 0, run.err
    _, plain = answers_of(tmp_path / "base")
    name, answers = answers_of(out)
    assert name == f"{tiny_model_dir.name}+adapter"

    def last(rows):
        return {row["question_id"]: row["choices"] for row in rows}

    assert last(plain).keys() == last(answers).keys()
    assert last(plain) != last(answers)
    assert run(judge_prompts=None) == 2
    assert "holds answers made otherwise: adapter was '" in run.err
    # The same folder, trained further.
    save_adapter(tiny_model_dir, tmp_path / "again", r=16, paca_alpha=64, seed=5)
    name = "adapter_model.safetensors"
    (tmp_path / "again" / name).replace(tmp_path / "adapter" / name)
    assert run(**adapted) == 2
    assert "adapter_sha256 was" in run.err


def test_nothing_judged_is_no_success(run, judge, out):
    answer_as_other(out)
    judge.rate = lambda prompt: 11
    assert run(model="other", judge_attempts=1) == 1
    result = result_of(out)
    assert result["table"][-1]["num_failed"] == len(result["failures"]) == 16
    assert "16 turns have no score" in run.out


def test_the_key_is_in_no_file_and_no_output(run, judge, out, monkeypatch):
    """Nor where the judge gives out, which leaves an unfinished folder."""
    answer_as_other(out)
    judge.key = "sk-secret-0123456789"
    monkeypatch.setenv("JUDGE_KEY", judge.key)
    judge.misdeeds.extend([*["leak"] * 3, *[(503, {})] * 10])
    options = {"model": "other", "judge_key_env": "JUDGE_KEY", "judge_parallel": 1}
    assert run(**options) == 2
    assert "3 replies are kept" in run.err
    assert result_of(out) == {"finished": False}
    said = run.out + run.err
    judge.misdeeds.clear()
    num_asked = len(judge.requests)
    assert run(**options) == 0, run.err
    assert len(judge.requests) - num_asked == 13
    assert result_of(out)["finished"]
    written = [path for path in out.rglob("*") if path.is_file()]
    assert len(written) >= 5
    assert not any(b"sk-secret" in path.read_bytes() for path in written)
    assert "sk-secret" not in said + run.out + run.err


@pytest.mark.usefixtures("no_model")
def test_mistakes_are_one_line_before_a_model_is_loaded(run, out):
    for options, message in (
        ({"model": None}, "nothing to evaluate; give --model, --adapter or both"),
        ({"questions": "./no.jsonl"}, "./no.jsonl does not exist; check `questions`"),
        ({"judge_parallel": 0}, "judge_parallel"),
        ({"judge_modell": "x"}, "unknown option --judge_modell; did you mean '--judge_model'"),
    ):
        assert run(**options) == 2
        assert message in run.err
        assert run.err.startswith("mt_bench: error: ")
        assert run.err.count("\n") == 1
    assert not out.exists()
