"""Cells made of commands: done once, gone on with, and clear when one fails."""

import json

import pytest

from pacatune.experiments.paper import TABLES
from pacatune.experiments.reproduce import choices, commands
from pacatune.experiments.reproduce.commands import Steps, evaluate_words, shell_line
from pacatune.experiments.reproduce.text_runs import text_run


def tell(line):
    pass


def make_run(**changes):
    stated = choices.choice_stated(TABLES["table1"].row("llama3-8b-paca-r8"))
    options = {"model": "m", "data": {"path": "d.jsonl"}, "rate": 1e-3, "dtype": "float32"}
    return text_run(stated, "paca", **options | changes)


def write_report(folder, values):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "report.json").write_text(json.dumps(values))


def test_words():
    words = evaluate_words("mmlu", "a model", None, "--limit", "3")
    assert shell_line(words) == "pacatune evaluate mmlu --model 'a model' --limit 3"


@pytest.mark.parametrize(
    ("before", "more"),
    [((), []), (("config.yaml",), ["--overwrite"]), (("checkpoint-2",), ["--resume"])],
)
def test_training_goes_on_where_it_was_stopped(before, more, tmp_path, monkeypatch):
    output, seen = tmp_path / "run", []

    def main(words, log):
        seen.append(words)
        write_report(output, {"loss": 1.0})
        return 0

    monkeypatch.setattr(commands, "_run_here", main)
    for name in before:
        (output / name).mkdir(parents=True)
    steps = Steps(folder=tmp_path, tell=tell, place="here")
    report, folder = steps.train(make_run(), "run")
    assert (report, folder) == ({"loss": 1.0}, output)
    assert seen == [["train", "--config", str(tmp_path / "run.yaml"), *more]]
    assert f"output_dir: {output}" in (tmp_path / "run.yaml").read_text()
    steps.train(make_run(), "run")
    assert len(seen) == 1


def test_half_an_evaluation_is_made_again(tmp_path, monkeypatch):
    output, seen = tmp_path / "score", []

    def main(words, log):
        assert not output.exists()
        seen.append(words)
        output.mkdir()
        (output / "evaluation.json").write_text('{"finished": true, "result": 7}')
        return 0

    monkeypatch.setattr(commands, "_run_here", main)
    output.mkdir()
    (output / "evaluation.json").write_text('{"finished": false}')
    steps = Steps(folder=tmp_path, tell=tell, place="here")
    for _ in range(2):
        assert steps.evaluate(["evaluate", "choice"], "score")["result"] == 7
    assert seen == [["evaluate", "choice", "--output", str(output)]]


@pytest.mark.parametrize("place", ["here", "apart"])
def test_a_command_that_fails_says_so(place, tmp_path):
    steps = Steps(folder=tmp_path, tell=tell, place=place)
    with pytest.raises(RuntimeError, match=r"`pacatune trian` ended with status 2: .*'train'"):
        steps._run(["trian"], "run")
    assert "unknown command 'trian'" in (tmp_path / "run.log").read_text()


def test_an_interrupted_command_interrupts_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr(commands, "_run_apart", lambda words, log: 130)
    with pytest.raises(KeyboardInterrupt):
        Steps(folder=tmp_path, tell=tell, place="apart")._run(["train"], "run")


def test_mt_bench_is_asked_again_and_goes_on_by_itself(tmp_path, monkeypatch):
    def main(words, log):
        output = tmp_path / "mt-bench"
        output.mkdir(exist_ok=True)
        (output / "mt_bench.json").write_text('{"table": []}')
        return 0

    monkeypatch.setattr(commands, "_run_apart", main)
    steps = Steps(folder=tmp_path, tell=tell, place="apart")
    assert steps.mt_bench(["evaluate", "mt-bench"], "mt-bench") == {"table": []}


@pytest.fixture
def tiny_questions(tmp_path, tiny_model_dir, monkeypatch):
    """Table 1's small runs, of one step on a tiny model and eight questions."""
    rows = [
        {
            "prompt": f"Is {n} even? A:",
            "completion": f" {'yes' if n % 2 == 0 else 'no'}",
            "question": f"Is {n} even?",
            "choices": ["yes", "no"],
            "answer": n % 2,
        }
        for n in range(60)
    ]
    for name, part in (("train", rows[:50]), ("heldout", rows[50:])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    monkeypatch.setattr(choices, "_STEPS", 1)
    monkeypatch.setattr(choices, "_RATES", (1e-3, 1e-1))
    monkeypatch.setattr(choices, "_NUM_QUESTIONS", 8)
    monkeypatch.setattr(
        "pacatune.data.packaged.language_models.prepare_model", lambda cache, say: tiny_model_dir
    )
    monkeypatch.setattr(
        "pacatune.data.packaged.question_types.prepare_type_choices",
        lambda cache, say: (tmp_path / "train.jsonl", tmp_path / "heldout.jsonl"),
    )


def test_a_small_line_of_table_1_is_trained_and_scored(tiny_questions, tmp_path, monkeypatch):
    cell = choices.choice_cell(TABLES["table1"].row("llama3-8b-paca-r8"))
    lines = []
    result = cell.run(tmp_path / "work", lines.append)
    assert set(result["values"]) == {"0", "1"}
    assert all(0 <= value <= 1 for value in result["values"].values())
    assert f"{result['learning_rate']}" == min(result["rates"], key=result["rates"].get)
    assert sum(" train --config" in line for line in lines) == 3  # two rates, one more seed
    assert sum(" evaluate choice" in line for line in lines) == 2
    assert result["num_trainable_parameters"] > 0
    # Killed and called again, it does nothing twice.
    monkeypatch.setattr(Steps, "_run", None)
    assert cell.run(tmp_path / "work", lines.append) == result
