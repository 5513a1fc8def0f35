"""From a tiny model's answers to the table, as the command line does it."""

import json
import shutil
import subprocess
import sys
import time

import pytest

from experiments.mt_bench import answering
from experiments.mt_bench.run import main
from tests.adapters.fixtures import save_adapter
from tests.experiments.mt_bench.conftest import answer_row, question_rows, write_lines


@pytest.fixture
def run(tiny_model_dir, files, judge, tmp_path, capsys):
    """Run with the tiny model; `run.out` and `run.err` hold what was said. None is no option."""

    def run(**options):
        given = {
            "output": tmp_path / "out",
            "model": tiny_model_dir,
            "device": "cpu",
            "judge_url": judge.url,
            "judge_model": "judge",
            "judge_retries": 0,
            "max_new_tokens": 8,
        }
        words = [
            word
            for name, value in (given | files | options).items()
            if value is not None
            for word in (f"--{name.replace('_', '-')}", str(value))
        ]
        status = main(words)
        run.out, run.err = capsys.readouterr()
        return status

    return run


def read(path):
    return json.loads(path.read_text())


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_from_the_questions_to_the_table(run, judge, tmp_path, tiny_model_dir):
    assert run() == 0, run.err
    out = tmp_path / "out"
    assert judge.complaints == []
    assert len(judge.requests) == 16
    result = read(out / "mt_bench.json")
    assert result["finished"]
    names = [line["name"] for line in result["table"]]
    assert names == ["writing", "math", "coding", "stem", "all"]
    answers = lines_of(out / "model_answer" / f"{tiny_model_dir.name}.jsonl")
    judgments = lines_of(out / "model_judgment" / "judge_single.jsonl")
    assert result["table"][-1]["mean"] == pytest.approx(sum(j["score"] for j in judgments) / 16)
    # What was judged is what was answered.
    for row in {row["question_id"]: row for row in answers}.values():
        prompts = {
            j["turn"]: j["user_prompt"] for j in judgments if j["question_id"] == row["question_id"]
        }
        first, second = row["choices"][0]["turns"]
        assert first in prompts[1]
        assert first in prompts[2]
        assert second in prompts[2]
    page = (out / "mt_bench.md").read_text()
    assert "| all |" in page
    assert page in run.out


def test_answers_first_and_judgments_later(run, judge, tmp_path, monkeypatch):
    assert run(judge_prompts=None) == 0
    assert "table" not in read(tmp_path / "out" / "mt_bench.json")
    assert judge.requests == []

    def load(*args, **kwargs):
        raise AssertionError("the model is not needed any more")

    monkeypatch.setattr(answering, "TextGenerator", load)
    for _ in range(2):
        assert run() == 0
        assert read(tmp_path / "out" / "mt_bench.json")["table"][-1]["num_judged"] == 16
    assert len(judge.requests) == 16


def test_answers_of_others_are_judged_without_a_model(run, judge, tmp_path):
    rows = [answer_row(row["question_id"], ["first {it}", "second"]) for row in question_rows()]
    (tmp_path / "out" / "model_answer").mkdir(parents=True)
    write_lines(tmp_path / "out" / "model_answer" / "other.jsonl", rows)
    assert run(model="other") == 0, run.err
    assert read(tmp_path / "out" / "mt_bench.json")["model_id"] == "other"
    assert any("first {it}" in body["messages"][1]["content"] for _, body in judge.requests)


def test_a_killed_run_loses_only_what_was_under_way(run, judge, files, tmp_path):
    rows = [answer_row(row["question_id"], ["first", "second"]) for row in question_rows()]
    (tmp_path / "out" / "model_answer").mkdir(parents=True)
    write_lines(tmp_path / "out" / "model_answer" / "other.jsonl", rows)
    judge.delay_s = 0.1
    given = files | {"output": tmp_path / "out", "model": "other", "judge_url": judge.url}
    given |= {"judge_model": "judge", "judge_parallel": 2, "max_new_tokens": 8}
    words = [w for k, v in given.items() for w in (f"--{k.replace('_', '-')}", str(v))]
    program = subprocess.Popen([sys.executable, "-m", "experiments.mt_bench", *words])
    path = tmp_path / "out" / "model_judgment" / "judge_single.jsonl"
    while not (path.exists() and path.read_bytes().count(b"\n") >= 4):
        assert program.poll() is None
        time.sleep(0.01)
    program.kill()
    program.wait()
    num_kept = path.read_bytes().count(b"\n")
    with path.open("ab") as file:
        file.write(b'{"question_id": 1, "jud')  # as if the kill had come while it wrote
    time.sleep(0.3)  # the server finishes what it was asked
    num_asked, judge.delay_s = len(judge.requests), 0
    assert num_kept <= num_asked <= num_kept + 2
    assert run(model="other") == 0, run.err
    assert len(judge.requests) - num_asked == 16 - num_kept
    assert read(tmp_path / "out" / "mt_bench.json")["table"][-1]["num_judged"] == 16


def test_an_adapter_answers_otherwise_and_does_not_mix(run, tiny_model_dir, tmp_path):
    save_adapter(tiny_model_dir, tmp_path / "adapter", r=16, paca_alpha=64)
    adapted = {"adapter": tmp_path / "adapter", "judge_prompts": None}
    assert run(judge_prompts=None, output=tmp_path / "base") == run(**adapted) == 0
    (base,) = (tmp_path / "base" / "model_answer").iterdir()
    (path,) = (tmp_path / "out" / "model_answer").iterdir()
    assert path.stem == f"{tiny_model_dir.name}+adapter"
    assert [r["choices"] for r in lines_of(base)] != [r["choices"] for r in lines_of(path)]
    assert run(judge_prompts=None) == 2
    assert "holds answers made otherwise: adapter was '" in run.err
    # The same folder, trained further.
    save_adapter(tiny_model_dir, tmp_path / "again", r=16, paca_alpha=64, seed=5)
    (tmp_path / "again" / "adapter_model.safetensors").replace(
        tmp_path / "adapter" / "adapter_model.safetensors"
    )
    assert run(**adapted) == 2
    assert "adapter_sha256 was" in run.err


def test_a_quantised_base_answers(run, tmp_path):
    pytest.importorskip("bitsandbytes", reason="not installed")
    assert run(judge_prompts=None, output=tmp_path / "base") == 0
    assert run(judge_prompts=None, quantization="nf4") == 0
    (base,) = (tmp_path / "base" / "model_answer").iterdir()
    (quantised,) = (tmp_path / "out" / "model_answer").iterdir()
    assert [r["choices"] for r in lines_of(base)] != [r["choices"] for r in lines_of(quantised)]


def test_more_questions_add_to_the_answers(run, files, tmp_path):
    write_lines(tmp_path / "questions.jsonl", question_rows()[:1])
    assert run(judge_prompts=None) == 0
    write_lines(tmp_path / "questions.jsonl", question_rows())
    assert run(judge_prompts=None) == 0
    (path,) = (tmp_path / "out" / "model_answer").iterdir()
    assert [row["question_id"] for row in lines_of(path)[:3]] == [1, 1, 2]


def test_nothing_judged_is_no_success(run, judge, tmp_path):
    judge.rate = lambda prompt: 11
    assert run(judge_attempts=1) == 1
    result = read(tmp_path / "out" / "mt_bench.json")
    assert result["table"][-1]["num_failed"] == len(result["failures"]) == 16
    assert "16 turns have no score" in run.out


def test_the_key_is_in_no_file_and_no_output(run, judge, tmp_path, monkeypatch):
    judge.key = "sk-secret-0123456789"
    monkeypatch.setenv("JUDGE_KEY", judge.key)
    judge.misdeeds.extend(["leak"] * 3)
    assert run(judge_key_env="JUDGE_KEY") == 0, run.err
    written = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert len(written) >= 5
    assert not any(b"sk-secret" in path.read_bytes() for path in written)
    assert "sk-secret" not in run.out + run.err


def test_mistakes_are_one_line_before_a_model_is_loaded(run, files, tmp_path, monkeypatch):
    def load(*args, **kwargs):
        raise AssertionError("too late")

    monkeypatch.setattr(answering, "TextGenerator", load)
    for options, message in (
        ({"model": None}, "nothing to evaluate; give --model, --adapter or both"),
        ({"judge_key_env": "NOT_SET"}, "names a variable that is not set"),
        ({"questions": "./no.jsonl"}, "./no.jsonl does not exist; check `questions`"),
        ({"references": None}, "has no reference to both turns of 11, 12, 31, 32"),
        ({"judge_parallel": 0}, "judge_parallel"),
        ({"judge_modell": "x"}, "unknown option --judge-modell; did you mean '--judge-model'"),
    ):
        assert run(**options) == 2
        assert message in run.err
        assert run.err.startswith("mt_bench: error: ")
        assert run.err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_judge_that_gives_out_leaves_an_unfinished_folder(run, judge, tmp_path):
    judge.misdeeds.extend([*["none"] * 3, *[(502, {}, {})] * 10])
    assert run(judge_parallel=1) == 2
    assert "3 replies are kept" in run.err
    assert read(tmp_path / "out" / "mt_bench.json") == {"finished": False}
    judge.misdeeds.clear()
    assert run() == 0
    assert read(tmp_path / "out" / "mt_bench.json")["finished"]


def test_chat_templates(run, tmp_path, tiny_model_dir):
    bare = shutil.copytree(tiny_model_dir, tmp_path / "bare")
    (bare / "chat_template.jinja").unlink()
    assert run(model=bare) == 2
    assert "has no chat template" in run.err
    template = tmp_path / "mine.jinja"
    template.write_text("{% for message in messages %}({{ message.content }}){% endfor %}")
    more = {"judge_prompts": None, "output": tmp_path / "other"}
    assert run(model=bare, chat_template=template, **more) == 0
    template.write_text("{{ raise_exception('one turn only') }}")
    assert run(model=bare, chat_template=template, judge_prompts=None, output=tmp_path / "b") == 2
    assert "one turn only" in run.err
