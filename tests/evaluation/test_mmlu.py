"""MMLU by lm-eval itself on a tiny model, from local files."""

import datasets
import pytest

from pacatune.evaluation import evaluate_tasks
from pacatune.evaluation.tasks import prepare_tasks
from tests.conftest import build_model
from tests.evaluation.conftest import log_likelihood
from tests.evaluation.mmlu import LETTERS, bundled_questions

ANATOMY = ["mmlu_anatomy"]


def prompt_of(asked, examples):
    """The prompt in plain Python: five-shot MMLU as its authors wrote it."""
    about = asked["subject"].replace("_", " ")
    text = f"The following are multiple choice questions (with answers) about {about}.\n\n"
    for one in [*examples, asked]:
        text += one["question"].strip()
        text += "".join(f"\n{LETTERS[i]}. {one['choices'][i]}" for i in range(4)) + "\nAnswer:"
        text += "" if one is asked else f" {LETTERS[one['answer']]}\n\n"
    return text


def test_log_likelihoods_are_those_of_the_plain_prompt(model, tokenizer, tasks_dir):
    options = {"tasks_dir": tasks_dir, "num_fewshot": 5}
    scores = evaluate_tasks(model, tokenizer, ANATOMY, **options)
    pool = bundled_questions()["anatomy"]
    assert len(scores.questions) == len(pool) == 5
    for asked in scores.questions:
        one = dict(pool[asked["number"]])
        text = prompt_of(one, pool)
        expected = [log_likelihood(model, tokenizer, text, f" {letter}") for letter in LETTERS]
        assert asked["responses"] == pytest.approx(expected, abs=1e-4)
        best = max(range(4), key=asked["responses"].__getitem__)
        assert asked["acc"] == float(best == one["answer"])
    # Prompts that do not fit are counted.
    small = build_model(len(tokenizer), max_position_embeddings=300)
    assert evaluate_tasks(small, tokenizer, ANATOMY, limit=2, **options).num_truncated == 2


def test_categories_count_questions(model, tokenizer, tasks_dir):
    scores = evaluate_tasks(model, tokenizer, ["mmlu"], tasks_dir=tasks_dir, num_fewshot=0, limit=1)
    counts = {name: scores.tasks[name]["acc"].num_questions for name in scores.groups}
    fields = {"stem": 19, "other": 13, "social_sciences": 12, "humanities": 13}
    assert counts == {"mmlu": 57, **{f"mmlu_{name}": number for name, number in fields.items()}}
    assert set(list(scores.tasks)[:5]) == set(counts)
    mean = sum(one["acc"] for one in scores.questions) / 57
    assert scores.tasks["mmlu"]["acc"].value == pytest.approx(mean)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_fewshot": 6}, r"`num_fewshot` is too many: .* 5 that are available\. Lower"),
        ({"num_fewshot": -1}, r"`num_fewshot` \(-1\) must be at least 0"),
        ({"limit": 0}, r"`limit` \(0\) must be at least 1, or left out"),
    ],
)
def test_wrong_options(model, tokenizer, tasks_dir, options, message):
    with pytest.raises(ValueError, match=message):
        evaluate_tasks(model, tokenizer, ANATOMY, tasks_dir=tasks_dir, **options)


@pytest.mark.parametrize("text", ["doc_to_text: !function utils.text\n", "class: utils.Task\n"])
def test_task_files_are_never_run(tmp_path, text):
    (tmp_path / "utils.py").write_text("raise SystemExit('run')\n")
    (tmp_path / "x.yaml").write_text(f"task: x\n{text}")
    with pytest.raises(ValueError, match="code in task files is never run"):
        prepare_tasks(["x"], tmp_path)
    # What another file hides is not run either.
    (tmp_path / "shared").write_text(text)
    (tmp_path / "x.yaml").write_text("task: x\ninclude: shared\n")
    with pytest.raises(ValueError, match="shared names a function or class"):
        prepare_tasks(["x"], tmp_path)


def test_hub_that_cannot_be_reached(monkeypatch):
    def refuse(*args, **kwargs):
        raise ConnectionError("no network")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(OSError, match=r"mmlu cannot be had \(Conn.*hub can be .*--tasks_dir"):
        prepare_tasks(["mmlu"])
