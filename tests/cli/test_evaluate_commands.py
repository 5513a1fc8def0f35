"""Each evaluation from its words to its files, on a tiny model."""

import json

import pytest

from pacatune.adapters import loading
from pacatune.cli import main
from tests.conftest import build_model
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
    lines = [json.dumps(row) + "\n" for row in QUESTIONS]
    (folder / "questions.jsonl").write_text("".join(lines))
    (folder / "text.txt").write_text("What is the capital of France? " * 20)
    write_mmlu(folder / "tasks")
    return folder


@pytest.fixture
def evaluate(folder, tmp_path, monkeypatch, capsys):
    """Run an evaluation of the model; return its evaluation.json and what it printed."""
    monkeypatch.chdir(folder)

    def run(what, *words, model=("--model", "m"), output=tmp_path / "out"):
        monkeypatch.setenv("COLUMNS", "200")
        status = main(["evaluate", what, *model, *words, "--output", str(output)])
        assert status == 0, capsys.readouterr().err
        values = json.loads((output / "evaluation.json").read_text())
        assert values["finished"] is True
        assert values["command"].startswith(f"pacatune evaluate {what} ")
        return values, capsys.readouterr().out

    return run


def test_mmlu(evaluate, tmp_path):
    words = ("--tasks-dir", "tasks", "--limit", "1", "--num-fewshot", "1")
    values, out = evaluate("mmlu", *words)
    assert values["result"]["tasks"]["mmlu"]["acc"]["num_questions"] == 57
    assert "mmlu_social_sciences" in out
    assert "mmlu_anatomy" not in out
    assert values["settings"]["tasks"] == ["mmlu"]
    assert len((tmp_path / "out" / "questions.jsonl").read_text().splitlines()) == 57
    page = (tmp_path / "out" / "evaluation.md").read_text()
    assert "| task | metric | value | standard error | questions | examples |" in page


def test_mmlu_has_five_examples_and_says_what_did_not_fit(evaluate, tiny_model_dir):
    words = ("--tasks-dir", "tasks", "--tasks", "mmlu_anatomy", "--limit", "2")
    values, out = evaluate("mmlu", *words, model=("--model", str(tiny_model_dir)))
    assert "2 prompts are longer than the model's context and lost their start." in out
    assert values["result"]["num_fewshot"] == {"mmlu_anatomy": 5}


def test_choice(evaluate):
    values, out = evaluate("choice", "--data", "questions.jsonl", "--limit", "4", "--chat")
    assert "33.3" in out
    result = values["result"]["questions.jsonl"]
    assert result["accuracy"]["num_questions"] == 4
    assert result["chance"] == pytest.approx(1 / 3)


def test_adapter_scores_as_the_merged_model_does(evaluate, folder, tmp_path):
    from tests.adapters.fixtures import save_adapter

    save_adapter(folder / "m", tmp_path / "adapter", r=16, paca_alpha=64)
    words = ["--model", str(folder / "m"), "--adapter", str(tmp_path / "adapter")]
    assert main(["merge", *words, "--output", str(tmp_path / "merged"), "--no-verify"]) == 0
    scored = {
        name: evaluate("perplexity", "--text", "text.txt", model=model, output=tmp_path / name)[0]
        for name, model in (
            ("base", words[:2]),
            ("adapted", words),
            ("whole", ["--model", str(tmp_path / "merged")]),
        )
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
    (tmp_path / "short.jsonl").write_text(json.dumps(QUESTIONS[0]))
    data = ["--data", str(folder / "questions.jsonl"), str(tmp_path / "short.jsonl")]
    words = ["evaluate", "choice", "--model", str(folder / "m"), *data]
    assert main([*words, "--output", str(tmp_path / "out")]) == 130
    values = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert values["finished"] is False
    assert list(values["result"]) == [str(folder / "questions.jsonl")]


def test_perplexity(evaluate):
    values, out = evaluate("perplexity", "--text", "text.txt", "--window", "64", "--stride", "63")
    assert "bits per byte" in out
    result = values["result"]["text.txt"]
    assert result["num_bytes"] == 620
    assert values["settings"]["window"] == 64
    assert len(values["settings"]["text_sha256"]["text.txt"]) == 64


def test_default_text(evaluate):
    values, _ = evaluate("perplexity", "--max-tokens", "200")
    assert values["result"]["pydoc_data.topics"]["num_tokens"] == 199


def test_lm_eval(evaluate):
    words = ("--tasks", "mmlu_virology,mmlu_stem", "--tasks-dir", "tasks", "--limit", "1")
    values, out = evaluate("lm-eval", *words, "--num-fewshot", "0")
    assert "mmlu_virology" in out
    assert values["result"]["tasks"]["mmlu_virology"]["acc"]["num_questions"] == 1
    assert values["result"]["tasks"]["mmlu_stem"]["acc"]["num_questions"] == 19
    assert values["result"]["num_fewshot"]["mmlu_virology"] == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["lm-eval", "--tasks", "mmlu_stm", "--tasks-dir", "tasks"],
            "unknown task 'mmlu_stm'; the",
        ),
        (["choice", "--data", "fever"], "'fever' is not a file; give one with questions"),
        (["choice", "--data", "no.jsonl"], "'no.jsonl' is not a file; give one with questions"),
        (
            ["perplexity", "--text", "m/model.safetensors"],
            "`text` ('m/model.safetensors') is no file in UTF-8",
        ),
        (["mmlu", "--tasks-dir", "nowhere"], "'nowhere' has no task (*.yaml); see"),
    ],
)
def test_wrong_input_is_found_before_a_model_is_loaded(
    folder, tmp_path, monkeypatch, capsys, words, message
):
    monkeypatch.chdir(folder)
    monkeypatch.setattr(loading, "load_language_model", lambda *_, **__: pytest.fail("loaded"))
    assert main(["evaluate", *words, "--model", "m", "--output", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "words",
    [
        ["mmlu", "--tasks-dir", "nowhere"],
        ["choice", "--data", "nothing"],
        ["perplexity", "--text", "nothing"],
        ["lm-eval", "--tasks", "nothing"],
    ],
)
def test_a_result_is_never_overwritten(tmp_path, capsys, words):
    (tmp_path / "evaluation.json").write_text("{}")
    assert main(["evaluate", *words, "--model", "no", "--output", str(tmp_path)]) == 2
    assert "is not empty; choose another" in capsys.readouterr().err
    assert (tmp_path / "evaluation.json").read_text() == "{}"


def test_names_of_nothing(capsys):
    assert main(["evaluate", "lm-eval", "--tasks", ",", "--output", "x"]) == 2
    assert "`tasks` (',') must be names with commas" in capsys.readouterr().err
