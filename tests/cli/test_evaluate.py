"""Each evaluation from its words to its files, on a tiny model."""

import json

import pytest

from pacatune.cli import main
from tests.conftest import build_model
from tests.data.conftest import write_lines
from tests.evaluation.mmlu import write_mmlu

QUESTIONS = [
    {"question": f"Is it {i}?", "choices": ["yes", "no, not at all", "it"], "answer": i % 3}
    for i in range(5)
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_tokenizer):
    """A model with room for MMLU's prompts, questions, a text, and MMLU's tasks."""
    folder = tmp_path_factory.mktemp("evaluate")
    build_model(len(tiny_tokenizer), max_position_embeddings=4096).save_pretrained(folder / "m")
    tiny_tokenizer.save_pretrained(folder / "m")
    write_lines(folder / "questions.jsonl", QUESTIONS)
    (folder / "text.txt").write_text("What is the capital of France? " * 20)
    write_mmlu(folder / "tasks")
    return folder


@pytest.fixture
def evaluate(folder, tmp_path, monkeypatch, shown):
    """Run an evaluation of the model; return its evaluation.json and what it printed."""
    monkeypatch.chdir(folder)
    monkeypatch.setenv("COLUMNS", "200")

    def run(line, model=("--model", "m"), output=tmp_path / "out"):
        out = shown("evaluate", *line.split(), *model, "--output", output)
        values = json.loads((output / "evaluation.json").read_text())
        assert values["finished"] is True
        assert values["command"].startswith(f"pacatune evaluate {line} ")
        return values, out

    return run


def test_mmlu(evaluate, tmp_path):
    values, out = evaluate("mmlu --tasks_dir tasks --limit 1 --num_fewshot 1")
    assert values["result"]["tasks"]["mmlu"]["acc"]["num_questions"] == 57
    assert "mmlu_social_sciences" in out
    assert "mmlu_anatomy" not in out
    assert len((tmp_path / "out" / "questions.jsonl").read_text().splitlines()) == 57
    assert "| task | metric | value |" in (tmp_path / "out" / "evaluation.md").read_text()


def test_mmlu_has_five_examples_and_says_what_did_not_fit(evaluate, tiny_model_dir):
    line = "mmlu --tasks_dir tasks --tasks mmlu_anatomy --limit 2"
    values, out = evaluate(line, model=("--model", tiny_model_dir))
    assert "2 prompts are longer than the model's context and lost their start." in out
    assert values["result"]["num_fewshot"] == {"mmlu_anatomy": 5}


def test_lm_eval(evaluate):
    tasks = "--tasks mmlu_virology,mmlu_stem --tasks_dir tasks"
    values, _ = evaluate(f"lm-eval {tasks} --limit 1 --num_fewshot 0")
    assert values["result"]["tasks"]["mmlu_stem"]["acc"]["num_questions"] == 19
    assert values["result"]["num_fewshot"]["mmlu_virology"] == 0


def test_choice(evaluate):
    values, _ = evaluate("choice --data questions.jsonl --limit 4 --chat")
    result = values["result"]["questions.jsonl"]
    assert result["accuracy"]["num_questions"] == 4
    assert result["chance"] == pytest.approx(1 / 3)


def test_perplexity(evaluate, tmp_path):
    values, out = evaluate("perplexity --text text.txt --window 64 --stride 63")
    assert "bits per byte" in out
    assert values["result"]["text.txt"]["num_bytes"] == 620
    assert len(values["settings"]["text_sha256"]["text.txt"]) == 64
    values, _ = evaluate("perplexity --max_tokens 200", output=tmp_path / "default")
    assert values["result"]["pydoc_data.topics"]["num_tokens"] == 199


def test_adapter_scores_as_the_merged_model_does(evaluate, folder, tmp_path, shown):
    """R7: the merged model is the same function."""
    from tests.adapters.fixtures import save_adapter

    save_adapter(folder / "m", tmp_path / "adapter", r=16, paca_alpha=64)
    words = ["--model", folder / "m", "--adapter", tmp_path / "adapter"]
    shown("merge", *words, "--output", tmp_path / "merged", "--no-verify")
    models = {"base": words[:2], "adapted": words, "whole": ["--model", tmp_path / "merged"]}
    scored = {
        name: evaluate("perplexity --text text.txt", model=model, output=tmp_path / name)[0]
        for name, model in models.items()
    }
    losses = {name: each["result"]["text.txt"]["loss"] for name, each in scored.items()}
    assert losses["adapted"] == pytest.approx(losses["whole"], abs=1e-5)
    assert losses["adapted"] != pytest.approx(losses["base"], abs=1e-3)
    assert scored["adapted"]["model"]["adapter_sha256"] is not None
    assert scored["adapted"]["model"]["base"] == scored["base"]["model"]["base"]


def test_what_was_scored_is_kept_when_the_next_fails(folder, tmp_path, monkeypatch):
    from pacatune.evaluation import choice

    whole = choice.evaluate_choice

    def fail_on_short(model, tokenizer, questions, **options):
        if len(questions) < 5:
            raise KeyboardInterrupt
        return whole(model, tokenizer, questions, **options)

    monkeypatch.setattr(choice, "evaluate_choice", fail_on_short)
    data = [str(folder / "questions.jsonl"), write_lines(tmp_path / "short.jsonl", QUESTIONS[:1])]
    words = ["evaluate", "choice", "--model", str(folder / "m"), "--data", *data]
    assert main([*words, "--output", str(tmp_path / "out")]) == 130
    values = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert values["finished"] is False
    assert list(values["result"]) == data[:1]
