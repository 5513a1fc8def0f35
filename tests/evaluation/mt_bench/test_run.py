"""From a tiny model's answers to the table, with everything that goes wrong between."""

import io
import json
import shutil
import signal
import threading

import pytest
from filelock import FileLock
from rich.console import Console

from pacatune.adapters import generation
from pacatune.evaluation.mt_bench import MtBenchConfig, run_mt_bench
from pacatune.evaluation.mt_bench.run import termination_interrupts
from tests.adapters.fixtures import save_adapter
from tests.evaluation.mt_bench.conftest import answer_row, write_lines


@pytest.fixture
def evaluate(tiny_model_dir, files, judge, tmp_path):
    """Run with the tiny model; `evaluate.log` and `.shown` hold what was said."""

    def evaluate(**options):
        config = {
            "output": tmp_path / "out",
            "model": str(tiny_model_dir),
            "device": "cpu",
            "questions": str(files["questions"]),
            "references": str(files["references"]),
            "judge_prompts": files["judge-prompts"],
            "judge_url": judge.url,
            "judge_model": "judge",
            "max_new_tokens": 8,
        } | options
        shown, log = io.StringIO(), io.StringIO()
        try:
            return run_mt_bench(
                MtBenchConfig(**config), Console(file=shown, width=120), Console(file=log)
            )
        finally:
            evaluate.shown, evaluate.log = shown.getvalue(), log.getvalue()

    return evaluate


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_from_the_questions_to_the_table(evaluate, judge, tmp_path, tiny_model_dir):
    result = evaluate()
    out = tmp_path / "out"
    assert judge.complaints == []
    assert len(judge.requests) == 16
    assert json.loads((out / "mt_bench.json").read_text()) == result
    assert result["finished"]
    assert [line["name"] for line in result["table"]] == [
        "writing",
        "math",
        "coding",
        "stem",
        "all",
    ]
    name = tiny_model_dir.name
    answers = lines_of(out / "model_answer" / f"{name}.jsonl")
    judgments = lines_of(out / "model_judgment" / "judge_single.jsonl")
    assert len(answers) == 8
    assert result["table"][-1]["mean"] == pytest.approx(sum(j["score"] for j in judgments) / 16)
    # What was judged is what was answered.
    for row in answers:
        prompts = {
            j["turn"]: j["user_prompt"] for j in judgments if j["question_id"] == row["question_id"]
        }
        first, second = row["choices"][0]["turns"]
        assert first in prompts[1]
        assert first in prompts[2]
        assert second in prompts[2]
    page = (out / "mt_bench.md").read_text()
    assert "| all |" in page
    assert "![scores by category](radar.png)" in page
    assert (out / "radar.png").stat().st_size > 10_000
    assert "all" in evaluate.shown
    assert "answered 8 of 8 questions" in evaluate.log
    assert "judged 16 of 16 turns" in evaluate.log


def test_answers_first_and_judgments_later(evaluate, judge, tmp_path, monkeypatch):
    result = evaluate(no_judge=True, judge_url=None)
    assert "table" not in result
    assert judge.requests == []
    assert "they are not judged" in evaluate.log
    answers = (tmp_path / "out" / "model_answer").iterdir()
    before = [path.read_bytes() for path in answers]

    def load(*args, **kwargs):
        raise AssertionError("the model is not needed any more")

    monkeypatch.setattr(generation, "TextGenerator", load)
    assert evaluate()["table"][-1]["num_judged"] == 16
    assert [path.read_bytes() for path in (tmp_path / "out" / "model_answer").iterdir()] == before
    evaluate()
    assert len(judge.requests) == 16


def test_an_adapter_answers_otherwise_and_does_not_mix(evaluate, tiny_model_dir, tmp_path, judge):
    save_adapter(tiny_model_dir, tmp_path / "adapter", r=16, paca_alpha=64)
    evaluate(no_judge=True, limit=1, output=tmp_path / "base")
    adapter = {"adapter": str(tmp_path / "adapter"), "no_judge": True, "limit": 1}
    evaluate(**adapter)
    (base,) = (tmp_path / "base" / "model_answer").iterdir()
    (adapted,) = (tmp_path / "out" / "model_answer").iterdir()
    assert adapted.stem == f"{tiny_model_dir.name}+adapter"
    texts = [[row["choices"] for row in lines_of(path)] for path in (base, adapted)]
    assert texts[0] != texts[1]
    with pytest.raises(ValueError, match=r"holds answers made otherwise: .*adapter was '.*' and i"):
        evaluate(no_judge=True, limit=1)
    # The same folder, trained further.
    save_adapter(tiny_model_dir, tmp_path / "again", r=16, paca_alpha=64, seed=5)
    (tmp_path / "again" / "adapter_model.safetensors").replace(
        tmp_path / "adapter" / "adapter_model.safetensors"
    )
    with pytest.raises(ValueError, match="adapter_weights was"):
        evaluate(**adapter)


def test_a_quantised_base_answers(evaluate, tmp_path):
    evaluate(no_judge=True, limit=1, output=tmp_path / "base")
    evaluate(no_judge=True, limit=1, quantization="nf4")
    (base,) = (tmp_path / "base" / "model_answer").iterdir()
    (quantised,) = (tmp_path / "out" / "model_answer").iterdir()
    texts = [[row["choices"] for row in lines_of(path)] for path in (base, quantised)]
    assert texts[0] != texts[1]
    settings = json.loads((tmp_path / "out" / "answers.json").read_text())
    assert settings["decides"]["quantization"] == "nf4"


def test_more_questions_add_to_the_answers(evaluate, tmp_path):
    evaluate(no_judge=True, categories=("math",), limit=1)
    (path,) = (tmp_path / "out" / "model_answer").iterdir()
    (first,) = lines_of(path)
    evaluate(no_judge=True, categories=("math", "stem"))
    rows = lines_of(path)
    assert len(rows) == 4
    assert first in rows


def test_answers_of_others_are_judged_without_a_model(evaluate, files, judge):
    result = evaluate(model=None, answers=str(files["answers"]))
    assert result["model_id"] == "model-a"
    assert len(judge.requests) == 16
    assert any("first {it}" in body["messages"][1]["content"] for _, body in judge.requests)
    # The key of a judgment is what was judged, wherever that came from.
    evaluate(model=None, answers=str(files["answers"]), model_id="other")
    assert len(judge.requests) == 16


def test_failures_are_shown_and_not_averaged(evaluate, files, judge):
    judge.rate = lambda prompt: 11 if "stem" in prompt else 4
    result = evaluate(model=None, answers=str(files["answers"]), judge_attempts=2)
    stem, everything = result["table"][-2:]
    assert (stem["mean"], stem["num_failed"]) == (None, 4)
    assert (everything["mean"], everything["num_judged"], everything["num_failed"]) == (4, 12, 4)
    assert len(judge.requests) == 12 + 2 * 4
    assert [one["question_id"] for one in result["failures"]] == [21, 21, 22, 22]
    assert "4 turns have no score; no mean counts them" in evaluate.shown
    assert "no rating from 1 to 10 in 2 replies" in evaluate.shown


def test_the_key_is_in_no_file_and_no_output(evaluate, files, judge, tmp_path, monkeypatch):
    judge.key = "sk-secret-0123456789"
    monkeypatch.setenv("JUDGE_KEY", judge.key)
    judge.misdeeds.extend(["leak"] * 3)
    evaluate(model=None, answers=str(files["answers"]), judge_key_env="JUDGE_KEY")
    assert judge.complaints == []
    written = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert len(written) >= 4
    assert not any(b"sk-secret" in path.read_bytes() for path in written)
    assert "sk-secret" not in evaluate.shown + evaluate.log
    assert "unencrypted" not in evaluate.log
    with pytest.raises(OSError, match="nothing answers at --judge-url"):
        evaluate(judge_key_env="JUDGE_KEY", judge_url="http://0.0.0.0:1/v1")
    assert "note: the judge's key goes to http://0.0.0.0:1/v1/chat" in evaluate.log


def test_bad_input_is_said_before_a_model_is_loaded(evaluate, tmp_path, files, judge, monkeypatch):
    def load(*args, **kwargs):
        raise AssertionError("too late")

    monkeypatch.setattr(generation, "TextGenerator", load)
    for options, error, message in (
        ({"judge_url": "http://127.0.0.1:1/v1"}, OSError, "nothing answers at --judge-url"),
        ({"judge_key_env": "NOT_SET"}, ValueError, "'NOT_SET'.* not set"),
        ({"references": str(files["answers"]), "questions": "./no.jsonl"}, OSError, "--questions"),
        ({"categories": ("mat",)}, ValueError, "did you mean 'math'"),
        ({"chat_template": tmp_path / "no.jinja"}, OSError, "--chat-template"),
    ):
        with pytest.raises(error, match=message):
            evaluate(**options)
    write_lines(files["references"], [answer_row(11, ["a", "b"])])
    with pytest.raises(ValueError, match="no reference answer to 3"):
        evaluate()
    assert not (tmp_path / "out").exists()
    assert judge.requests == []
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=r"did not write, .*\(thesis.txt\)"):
        evaluate(categories=("stem",))


def test_a_model_without_chat_template(evaluate, tmp_path, tiny_model_dir):
    bare = shutil.copytree(tiny_model_dir, tmp_path / "bare")
    (bare / "chat_template.jinja").unlink()
    with pytest.raises(ValueError, match=r"has no chat template, .*: --chat-template FILE"):
        evaluate(model=str(bare))
    template = tmp_path / "mine.jinja"
    template.write_text("{% for message in messages %}({{ message.content }}){% endfor %}")
    result = evaluate(
        model=str(bare), chat_template=template, no_judge=True, limit=1, output=tmp_path / "other"
    )
    assert result["num_questions"] == 4


def test_one_run_at_a_time(evaluate, files, tmp_path):
    options = {"model": None, "answers": str(files["answers"])}
    evaluate(**options)
    report = (tmp_path / "out" / "mt_bench.md").read_text()
    with (
        FileLock(tmp_path / "out" / ".pacatune" / "lock"),
        pytest.raises(ValueError, match=r"another run is at work in .*--output DIR"),
    ):
        evaluate(**options)
    assert (tmp_path / "out" / "mt_bench.md").read_text() == report
    evaluate(**options)


def test_a_judge_that_gives_out_leaves_an_unfinished_folder(evaluate, files, judge, tmp_path):
    options = {"model": None, "answers": str(files["answers"]), "judge_retries": 0}
    judge.misdeeds.extend([*["none"] * 3, *[(502, {}, {})] * 10])
    with pytest.raises(OSError, match="3 replies are kept"):
        evaluate(**options)
    assert json.loads((tmp_path / "out" / "mt_bench.json").read_text()) == {"finished": False}
    judge.misdeeds.clear()
    assert evaluate(**options)["finished"]


def test_termination_interrupts_inside_and_not_outside():
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt), termination_interrupts():
        signal.raise_signal(signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) == before


def test_another_thread_changes_nothing():
    seen = []

    def work():
        with termination_interrupts():
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [signal.getsignal(signal.SIGTERM)]
