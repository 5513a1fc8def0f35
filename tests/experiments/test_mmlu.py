"""Questions of MMLU are trained on in the tokens that lm-eval scores."""

import json

import pytest

from experiments import mmlu
from pacatune.data.config import DataConfig
from pacatune.data.prepare import prepare_data
from tests.data.conftest import write_lines
from tests.evaluation.mmlu import write_mmlu

BONE = {"question": " Which bone is longest?\nThink. ", "answer": 3, "subject": "anatomy"}
BONE["choices"] = ["Femur", " Skull", "Rib\n", "Été"]
SALE = {"question": "What sells?", "answer": 0, "subject": "high_school_world_history"}
SALE["choices"] = ["{{ 1 }}", "2", "3", "4"]


@pytest.fixture(scope="module")
def tasks_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mmlu") / "tasks"
    return write_mmlu(folder, questions={one["subject"]: [one] for one in (BONE, SALE)})


def prepare(tokenizer, path, **options):
    config = DataConfig(path=str(path), eval_fraction=0, **options)
    (row,) = prepare_data(config, tokenizer, max_length=None, stop_ids={2}).train
    return row


@pytest.mark.parametrize(("asked", "has_bos"), [(BONE, True), (SALE, False)])
def test_training_tokens_are_those_that_lm_eval_scores(
    tokenizer, tasks_dir, tmp_path, asked, has_bos
):
    from pacatune.evaluation.language_model import LanguageModel
    from pacatune.evaluation.tasks import prepare_tasks
    from tests.conftest import build_model

    if not has_bos:
        from tokenizers import processors

        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single="$A")
    (task,) = prepare_tasks([f"mmlu_{asked['subject']}"], tasks_dir)
    document = task.eval_docs[0]
    requests = task.construct_requests(document, task.fewshot_context(document, 0))
    lm = LanguageModel(build_model(len(tokenizer)), tokenizer)
    context, answer = lm._encode_pair(*requests[document["answer"]].args)
    row = prepare(tokenizer, write_lines(tmp_path / "train.jsonl", [mmlu.to_row(asked)]))
    learned = [*answer, tokenizer.eos_token_id]
    assert row["input_ids"] == [*context, *learned]
    assert row["labels"] == [-100] * len(context) + learned
    assert (row["input_ids"][0] == tokenizer.bos_token_id) is has_bos
    # Without a subject there is no description.
    named, nameless = mmlu.to_row(asked), mmlu.to_row({**asked, "subject": ""})
    assert nameless["prompt"] == task.doc_to_text(asked)
    assert named["prompt"] == task.config.description + nameless["prompt"]
    assert nameless["completion"] == f" {task.doc_to_choice(asked)[asked['answer']]}"


def test_as_the_authors_trained(tokenizer, tmp_path):
    """Neither BOS nor EOS."""
    asked = {"question": " What is it? ", "choices": ["a", "b ", "c", "d"], "answer": 2}
    path = write_lines(tmp_path / "train.jsonl", [mmlu.to_row({**asked, "subject": ""})])
    row = prepare(tokenizer, path, special_tokens=False)
    text = "What is it?\nA. a\nB. b \nC. c\nD. d\nAnswer: C"
    assert tokenizer.decode(row["input_ids"]) == text
    assert tokenizer.decode([label for label in row["labels"] if label != -100]) == " C"


def test_the_file_is_written_once(tmp_path, monkeypatch):
    asked = []

    def load_hub(*words):
        asked.append(words[:3])
        return [BONE, SALE]

    monkeypatch.setattr(mmlu, "load_hub", load_hub)
    path = tmp_path / "cache" / "mmlu.jsonl"
    for _ in range(2):
        mmlu.write_training_file(path)
    assert asked == [("cais/mmlu", "all", "auxiliary_train")]
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert rows == [mmlu.to_row(BONE), mmlu.to_row(SALE)]
    assert [*path.parent.iterdir()] == [path]


def test_nothing_is_overwritten(tmp_path, monkeypatch):
    path = tmp_path / "mine.jsonl"
    path.write_text("mine")
    monkeypatch.setattr("sys.argv", ["mmlu", str(path)])
    with pytest.raises(SystemExit, match=r"mine.jsonl is there already; choose another name"):
        mmlu.main()
    assert path.read_text() == "mine"
