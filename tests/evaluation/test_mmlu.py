"""MMLU by lm-eval itself on a tiny model, from local files."""

import hashlib

import lm_eval
import pytest
import torch
from lm_eval.api.model import LM
from lm_eval.tasks import TaskManager

from pacatune.evaluation import evaluate_tasks
from pacatune.evaluation.tasks import prepare_tasks
from tests.conftest import build_model
from tests.evaluation.mmlu import LETTERS, bundled_questions, write_mmlu

ANATOMY = ["mmlu_anatomy"]


class Recorder(LM):
    """Keeps what it is asked."""

    def __init__(self):
        super().__init__()
        self.asked = []

    def loglikelihood(self, requests):
        self.asked += [f"{one.task_name}|{one.args[0]}|{one.args[1]}" for one in requests]
        return [(0.0, False)] * len(requests)

    loglikelihood_rolling = generate_until = None


@pytest.mark.parametrize(
    ("test_split", "num_fewshot", "digest"),
    [
        ("test", 3, "6d8c246cfd189b1a978c8b5ac9c64647abf8b1d3766142c5476011d4d6f68376"),
        ("test", 5, "3eb3702589873bda242f65830ed338ef98fe5f7956c6cb2eaf6c8d6140518ef4"),
        # Each question with the others of its subject as examples.
        ("dev", 4, "4dc82f07fc2a4a1d8d5dcb6d013849825a21e1dde8e6ed6944b5c534da51ce48"),
    ],
)
def test_prompts_are_those_of_our_former_reader(tmp_path, test_split, num_fewshot, digest):
    """Task, prompt and continuation of every request; the digests are those of its folders."""
    names, recorder = ["mmlu"], Recorder()
    if num_fewshot > 3:
        names = [f"mmlu_{name}" for name, rows in bundled_questions().items() if len(rows) == 5]
        assert len(names) == 53
    tasks = prepare_tasks(names, write_mmlu(tmp_path / "tasks", test_split))
    lm_eval.simple_evaluate(
        model=recorder,
        tasks=tasks,
        task_manager=TaskManager(include_defaults=False),
        num_fewshot=num_fewshot,
        bootstrap_iters=0,
    )
    assert len(recorder.asked) == (1120 if names == ["mmlu"] else 53 * 5 * 4)
    text = "\0".join(sorted(recorder.asked))
    assert hashlib.sha256(text.encode()).hexdigest() == digest


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
    scores = evaluate_tasks(model, tokenizer, ANATOMY, tasks_dir=tasks_dir, num_fewshot=5)
    pool = bundled_questions()["anatomy"]
    assert len(scores.questions) == len(pool) == 5
    for asked in scores.questions:
        one = dict(pool[asked["number"]])
        text = prompt_of(one, pool)
        for i, letter in enumerate(LETTERS):
            ids = tokenizer(f"{text} {letter}", return_tensors="pt")["input_ids"]
            start = len(tokenizer(text)["input_ids"])
            with torch.no_grad():
                log_probs = model(ids).logits[0].log_softmax(-1)
            expected = sum(log_probs[k - 1, ids[0, k]].item() for k in range(start, ids.shape[1]))
            assert asked["responses"][i] == pytest.approx(expected, abs=1e-4)
        best = max(range(4), key=asked["responses"].__getitem__)
        assert asked["acc"] == float(best == one["answer"])


def test_categories_count_questions(model, tokenizer, tasks_dir):
    scores = evaluate_tasks(model, tokenizer, ["mmlu"], tasks_dir=tasks_dir, num_fewshot=0, limit=1)
    counts = {name: scores.tasks[name]["acc"].num_questions for name in scores.groups}
    assert counts == {
        "mmlu": 57,
        "mmlu_stem": 19,
        "mmlu_other": 13,
        "mmlu_social_sciences": 12,
        "mmlu_humanities": 13,
    }
    assert set(list(scores.tasks)[:5]) == set(counts)
    assert scores.tasks["mmlu"]["acc"].value == pytest.approx(
        sum(one["acc"] for one in scores.questions) / 57
    )


def test_prompts_that_do_not_fit_are_counted(tokenizer, tasks_dir):
    small = build_model(len(tokenizer), max_position_embeddings=300)
    scores = evaluate_tasks(small, tokenizer, ANATOMY, tasks_dir=tasks_dir, num_fewshot=5, limit=2)
    assert scores.num_truncated == 2


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


def test_empty_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"has no task \(\*.yaml\); see docs/evaluate.md"):
        prepare_tasks(["mmlu"], tmp_path)


def test_hub_that_cannot_be_reached(monkeypatch):
    import datasets

    def refuse(*args, **kwargs):
        raise ConnectionError("no network")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(OSError, match=r"mmlu cannot be had \(Conn.*hub can be .*--tasks-dir"):
        prepare_tasks(["mmlu"])
