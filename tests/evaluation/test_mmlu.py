"""MMLU by lm-eval itself on a tiny model."""

import math
import shutil

import pytest
import yaml

from pacatune.data.choices import LETTERS
from pacatune.evaluation import evaluate_mmlu
from pacatune.evaluation.harness import run_tasks
from pacatune.evaluation.mmlu import prepare_mmlu

SUBJECTS = ["anatomy", "marketing", "sociology"]


@pytest.fixture(scope="module")
def result(model, tiny_tokenizer, tasks_dir):
    return evaluate_mmlu(model, tiny_tokenizer, tasks_dir=tasks_dir, subjects=SUBJECTS)


def prompt_of(asked, examples):
    """The prompt in plain Python: five-shot MMLU as its authors wrote it."""
    about = asked.subject.replace("_", " ")
    text = f"The following are multiple choice questions (with answers) about {about}.\n\n"
    for one in [*examples, asked]:
        text += one.question.strip()
        text += "".join(f"\n{LETTERS[i]}. {one.choices[i]}" for i in range(4)) + "\nAnswer:"
        text += "" if one is asked else f" {LETTERS[one.answer]}\n\n"
    return text


def test_log_likelihoods_are_those_of_the_plain_prompt(result, model, tokenizer, bundled):
    import torch

    for asked in result.questions:
        subject = asked["task"].removeprefix("mmlu_")
        pool = bundled.shown[subject]
        one = pool[asked["number"]]
        text = prompt_of(one, [other for other in pool if other is not one])
        for i, letter in enumerate(LETTERS):
            ids = tokenizer(f"{text} {letter}", return_tensors="pt")["input_ids"]
            start = len(tokenizer(text)["input_ids"])
            with torch.no_grad():
                log_probs = model(ids).logits[0].log_softmax(-1)
            expected = sum(log_probs[k - 1, ids[0, k]].item() for k in range(start, ids.shape[1]))
            assert asked["responses"][i] == pytest.approx(expected, abs=1e-4)
        best = max(range(4), key=asked["responses"].__getitem__)
        assert asked["acc"] == float(best == one.answer)


def test_no_prompt_shows_the_question_that_it_asks(tasks_dir):
    tasks = prepare_mmlu(tasks_dir, SUBJECTS)
    for task in tasks.tasks[0].get_all_tasks():
        for number, asked in enumerate(task.eval_docs):
            context = task.fewshot_context(asked, task.config.num_fewshot)
            assert context.count("Answer:") == task.config.num_fewshot + 1 == 5
            assert context.count(task.doc_to_text(asked)) == 1, number


def test_categories_count_questions(result):
    assert {name: score.num_questions for name, score in result.categories.items()} == {
        "STEM": 5,
        "Social.": 5,
        "Other": 5,
    }
    assert set(result.subjects) == set(SUBJECTS)
    right = [each["acc"] for each in result.questions]
    assert result.average.num_questions == len(right) == 15
    assert result.average.value == pytest.approx(sum(right) / 15)
    assert result.average.stderr > 0
    assert result.num_fewshot == (4, 4)
    assert result.num_truncated == 0


def test_batches_with_padding_change_nothing(result, model, tokenizer, tasks_dir):
    alone = evaluate_mmlu(
        model, tokenizer, tasks_dir=tasks_dir, subjects=SUBJECTS[:1], batch_size=1
    )
    together = {each["number"]: each for each in result.questions if each["task"] == "mmlu_anatomy"}
    for each in alone.questions:
        assert each["responses"] == pytest.approx(together[each["number"]]["responses"], abs=1e-4)


def test_limit_gives_the_first_questions_and_a_standard_error(model, tokenizer, tasks_dir):
    result = evaluate_mmlu(
        model, tokenizer, tasks_dir=tasks_dir, subjects=SUBJECTS, limit=1, num_fewshot=0
    )
    assert [each["number"] for each in result.questions] == [0, 0, 0]
    share = result.average.value
    assert result.average.stderr == pytest.approx(math.sqrt(share * (1 - share) / 2))
    assert result.categories["STEM"].stderr is None
    assert result.num_fewshot == (0, 0)


def test_tasks_can_be_asked_again(model, tokenizer, tasks_dir):
    tasks = prepare_mmlu(tasks_dir, SUBJECTS[:1])
    first, again = (run_tasks(model, tokenizer, tasks, limit=limit) for limit in (2, 3))
    assert [each["number"] for each in again.questions] == [0, 1, 2]
    for one, other in zip(first.questions, again.questions, strict=False):
        assert one["responses"] == pytest.approx(other["responses"], abs=1e-4)


def test_prompts_that_do_not_fit_are_counted(tokenizer, tasks_dir):
    from tests.conftest import build_model

    small = build_model(len(tokenizer), max_position_embeddings=300)
    result = evaluate_mmlu(small, tokenizer, tasks_dir=tasks_dir, subjects=SUBJECTS, limit=2)
    assert result.num_truncated == 6


def test_folder_can_be_moved(tasks_dir, tmp_path):
    moved = shutil.copytree(tasks_dir, tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "data" / "anatomy_dev.jsonl").write_text(
        (moved / "data" / "marketing_dev.jsonl").read_text()
    )
    tasks = prepare_mmlu(moved, ["anatomy"])
    assert next(iter(tasks.tasks[0].get_all_tasks())).eval_docs[0]["subject"] == "marketing"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"subjects": ["anatomi"]}, "`subjects` names 'anatomi', which is not there; did you mean"),
        ({"num_fewshot": 5}, r"`num_fewshot` \(5\) is more than the 4 examples of mmlu_\w+; lower"),
        ({"num_fewshot": -1}, r"`num_fewshot` \(-1\) must be at least 0"),
    ],
)
def test_wrong_options(tasks_dir, options, message):
    with pytest.raises(ValueError, match=message):
        prepare_mmlu(tasks_dir, **{"subjects": SUBJECTS[:1], **options})


def test_wrong_limit(model, tokenizer, tasks_dir):
    with pytest.raises(ValueError, match=r"`limit` \(0\) must be at least 1, or left out"):
        evaluate_mmlu(model, tokenizer, tasks_dir=tasks_dir, subjects=SUBJECTS[:1], limit=0)


def test_damaged_folders(tasks_dir, tmp_path):
    folder = shutil.copytree(tasks_dir, tmp_path / "tasks")
    data = folder / "data" / "virology_dev.jsonl"
    whole = data.read_text()
    data.write_text(whole[:-40])
    with pytest.raises(
        ValueError, match=r"virology_dev.jsonl, row 5: .*a .jsonl file has one object"
    ):
        prepare_mmlu(folder)
    data.unlink()
    with pytest.raises(FileNotFoundError, match=r"virology_dev\.jsonl is missing, data of"):
        prepare_mmlu(folder)
    data.write_text(whole)
    (folder / "_mmlu.yaml").unlink()
    with pytest.raises(ValueError, match="has no task `mmlu`; make it with `pacatune"):
        prepare_mmlu(folder)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("task: x\ndoc_to_text: !function utils.text\n", "code in task files is never run"),
        ("task: x\nclass: !!python/name:os.system\n", "is not a plain YAML file"),
        ("task: x\nclass: utils.Task\n", "names a `class`; code in task files is never run"),
        ("task: 'x", "is not a plain YAML file"),
        ("- x\n", "holds a list; a task file is a mapping"),
        ("task: x\ninclude: shared\n", "(?s)shared is not a plain YAML.*code in task files is"),
        ("task: x\ninclude: [a/../x.yaml, shared]\n", "shared is not a plain YAML"),
    ],
)
def test_task_files_are_never_run(tmp_path, text, message):
    (tmp_path / "utils.py").write_text("raise SystemExit('run')\n")
    (tmp_path / "shared").write_text("doc_to_text: !function utils.text\n")
    (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(ValueError, match=message):
        prepare_mmlu(tmp_path)


def test_empty_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"has no task \(\*.yaml\); make one with"):
        prepare_mmlu(tmp_path)


def test_hub_that_cannot_be_reached(monkeypatch):
    import datasets

    def refuse(*args, **kwargs):
        raise ConnectionError("no network")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(OSError, match=r"mmlu cannot be had \(Conn.*cais/mmlu.*--tasks-dir"):
        prepare_mmlu()


def test_prompts_and_categories_are_lm_evals_own(tasks_dir):
    """All 57 subjects: the written tasks differ from lm-eval's in their data and examples only."""
    from pacatune.evaluation.mmlu_data import lm_eval_folder

    ours = {"dataset_path", "dataset_name", "dataset_kwargs", "test_split", "num_fewshot", "tag"}
    default = lm_eval_folder() / "default"
    template = yaml.safe_load((default / "_default_template_yaml").read_text())
    for file in sorted(default.glob("mmlu_*.yaml")):
        theirs = template | yaml.safe_load(file.read_text())
        written = yaml.safe_load((tasks_dir / file.name).read_text())
        for key in (theirs.keys() | written.keys()) - ours - {"include"}:
            assert written[key] == theirs[key], (file.name, key)
        group = yaml.safe_load(
            (tasks_dir / f"_{theirs['tag'].removesuffix('_tasks')}.yaml").read_text()
        )
        assert written["task"] in group["task"]
