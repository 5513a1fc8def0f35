"""Task files of one's own: tags, data, names."""

import pytest

from pacatune.cli.evaluate import lm_eval_report as make_report
from pacatune.evaluation import evaluate_tasks
from pacatune.evaluation.tasks import prepare_tasks
from tests.data.conftest import write_lines

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
LIKELY = TASK.format(name="likely", kind="loglikelihood", metric="acc")
WRITTEN = TASK.format(name="written", kind="generate_until", metric="exact_match")
WRITTEN += "generation_kwargs: {until: ['.'], max_gen_toks: 3}\n"


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "a.yaml").write_text(LIKELY)
    (tmp_path / "b.yaml").write_text(WRITTEN)
    rows = [{"question": f"What is {i}?", "answer": f"It {i}"} for i in range(3)]
    write_lines(tmp_path / "rows.jsonl", rows)
    return tmp_path


def test_a_tag_gives_its_tasks(model, tokenizer, folder):
    options = {"tasks_dir": folder, "num_fewshot": 1, "limit": 2, "chat": True}
    scores = evaluate_tasks(model, tokenizer, ["mine"], **options)
    assert {"likely", "written"} <= set(scores.tasks)
    likely = scores.tasks["likely"]["acc"]
    assert likely.num_questions == 2
    assert likely.value in (0.0, 0.5, 1.0)
    assert scores.num_fewshot["written"] == 1
    rows = {row[0]: row for row in make_report(scores).rows}
    assert rows["likely"][1:3] == ["acc", f"{likely.value:.4f}"]
    assert rows["likely"][4:] == ["2", "1"]
    texts = [each["responses"] for each in scores.questions if each["task"] == "written"]
    assert [type(text) for (text,) in texts] == [str] * 2


@pytest.mark.parametrize(
    ("files", "split"),
    [("rows.jsonl", "train"), ("[rows.jsonl]", "train"), ("{test: [rows.jsonl]}", "test")],
)
def test_data_files_are_relative_to_the_folder(folder, files, split):
    text = LIKELY.replace("{test: rows.jsonl}", files).replace("split: test", f"split: {split}")
    (folder / "a.yaml").write_text(text)
    (task,) = prepare_tasks(["likely"], folder)
    assert task.eval_docs[1]["answer"] == "It 1"


def test_data_that_cannot_be_had(folder):
    (folder / "rows.jsonl").write_text("{")
    with pytest.raises(OSError, match=r"the data of likely cannot be had .*see that"):
        prepare_tasks(["likely"], folder)
