import json

import pytest

from pacatune.cli.evaluate import lm_eval_report as make_report
from pacatune.evaluation import evaluate_tasks
from pacatune.evaluation.tasks import prepare_tasks

TASK = """\
task: {name}
tag: mine
dataset_path: json
dataset_kwargs: {{data_files: {{test: rows.jsonl}}}}
test_split: test
fewshot_split: test
output_type: {kind}
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list: [{{metric: {metric}, aggregation: mean, higher_is_better: true}}]
"""
ROWS = [{"question": f"What is {i}?", "answer": f"It {i}"} for i in range(3)]


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "tasks"
    folder.mkdir()
    (folder / "a.yaml").write_text(TASK.format(name="likely", kind="loglikelihood", metric="acc"))
    written = TASK.format(name="written", kind="generate_until", metric="exact_match")
    (folder / "b.yaml").write_text(
        f"{written}generation_kwargs: {{until: ['.'], max_gen_toks: 3}}\n"
    )
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return folder


def test_a_tag_gives_its_tasks(model, tokenizer, folder):
    scores = evaluate_tasks(
        model, tokenizer, ["mine"], tasks_dir=folder, num_fewshot=1, limit=2, chat=True
    )
    assert {"likely", "written"} <= set(scores.tasks)
    likely = scores.tasks["likely"]["acc"]
    assert likely.num_questions == 2
    assert likely.value in (0.0, 0.5, 1.0)
    assert scores.num_fewshot["written"] == 1
    rows = {row[0]: row for row in make_report(scores).rows}
    assert rows["likely"][1:3] == ["acc", f"{likely.value:.4f}"]
    assert rows["likely"][4:] == ["2", "1"]
    texts = [each["responses"] for each in scores.questions if each["task"] == "written"]
    assert len(texts) == 2
    assert all(isinstance(text, str) for (text,) in texts)


@pytest.mark.parametrize("files", ["rows.jsonl", "[rows.jsonl]", "{test: [rows.jsonl]}"])
def test_data_files_are_relative_to_the_folder(folder, files):
    text = TASK.format(name="likely", kind="loglikelihood", metric="acc")
    text = text.replace("{test: rows.jsonl}", files).replace("split: test", "split: train")
    if files.startswith("{"):
        text = text.replace("split: train", "split: test")
    (folder / "a.yaml").write_text(text)
    (task,) = prepare_tasks(["likely"], folder)
    assert task.eval_docs[1]["answer"] == "It 1"


def test_unknown_task_suggests_the_nearest(folder):
    with pytest.raises(ValueError, match="unknown task 'liked'; the nearest are likely"):
        prepare_tasks(["liked"], folder)


def test_data_that_cannot_be_had(folder):
    (folder / "rows.jsonl").write_text("{")
    with pytest.raises(OSError, match=r"the data of likely cannot be had .*see that"):
        prepare_tasks(["likely"], folder)
