"""The command: options, streams, exit status."""

import json

import pytest

from pacatune.cli import main
from tests.evaluation.mt_bench import conftest as data

files, judge = data.files, data.judge


@pytest.fixture
def words(files, judge, tmp_path):
    words = ["evaluate", "mt-bench", "--output", str(tmp_path / "out")]
    words += ["--judge-url", judge.url, "--judge-model", "judge"]
    for name in ("questions", "references", "judge-prompts"):
        words += [f"--{name}", str(files[name])]
    return words


def test_options_reach_the_run(words, judge, tiny_model_dir, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("JUDGE_KEY", "sk-1")
    judge.key = "sk-1"
    more = ["--model", str(tiny_model_dir), "--device", "cpu", "--categories", "math, stem"]
    more += ["--limit", "1", "--max-new-tokens", "6", "--batch-size", "2", "--seed", "3"]
    more += ["--model-id", "org/me", "--judge-key-env", "JUDGE_KEY", "--judge-parallel", "1"]
    more += ["--judge-timeout-s", "30", "--judge-retries", "1", "--judge-attempts", "1"]
    assert main([*words, *more]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("category")
    assert "judged 4 of 4 turns" in err
    settings = json.loads((tmp_path / "out" / "answers.json").read_text())
    assert settings["decides"]["max_new_tokens"] == 6
    assert settings["decides"]["seed"] == 3
    assert settings["batch_size"] == 2
    assert (tmp_path / "out" / "model_answer" / "org-me.jsonl").is_file()


def test_nothing_judged_is_no_success(words, judge, files, tmp_path, capsys):
    judge.rate = lambda prompt: 0
    more = ["--answers", str(files["answers"]), "--judge-attempts", "1", "--limit", "1"]
    assert main([*words, *more]) == 1
    assert "8 turns have no score" in " ".join(capsys.readouterr().out.split())
    assert json.loads((tmp_path / "out" / "mt_bench.json").read_text())["finished"]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ([], "nothing to evaluate; give --model"),
        (["--model", "m", "--judge-url", "localhost"], "--judge-url ('://localhost') must be like"),
        (["--answers", "nowhere.jsonl"], "--answers ('nowhere.jsonl') is no file"),
    ],
)
def test_a_mistake_is_one_line(words, capsys, more, message):
    assert main([*words, *more]) == 2
    err = capsys.readouterr().err
    assert err.startswith("pacatune: error: ")
    assert message in err
    assert err.count("\n") == 1
