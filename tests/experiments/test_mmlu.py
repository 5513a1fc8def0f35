"""Questions of MMLU are trained on in the tokens that lm-eval scores."""

import json
import shutil
from importlib.util import find_spec
from pathlib import Path

import pytest

from experiments import mmlu
from pacatune.data.config import DataConfig
from pacatune.data.encode import Encoder
from pacatune.data.prepare import prepare_data
from tests.adapters.fixtures import log_likelihood
from tests.conftest import build_model
from tests.data.conftest import write_lines

BONE = {"question": " Which bone is longest?\nThink. ", "answer": 3, "subject": "anatomy"}
BONE["choices"] = ["Femur", " Skull", "Rib\n", "Été"]
SALE = {"question": "What sells?", "answer": 0, "subject": "high_school_world_history"}
SALE["choices"] = ["{{ 1 }}", "2", "3", "4"]
TASKS = Path(find_spec("lm_eval").origin).parent / "tasks" / "mmlu" / "default"


@pytest.fixture(scope="module")
def tasks_dir(tmp_path_factory):
    """lm-eval's task files over a data set like cais/mmlu, of a question in two subjects."""
    folder = tmp_path_factory.mktemp("mmlu")
    shutil.copytree(TASKS, folder / "tasks")
    template = folder / "tasks" / "_default_template_yaml"
    template.write_text(template.read_text().replace("cais/mmlu", str(folder / "questions")))
    (folder / "questions").mkdir()
    configs = []
    for row in (BONE, SALE):
        subject = row["subject"]
        write_lines(folder / "questions" / f"{subject}.jsonl", [row])
        files = [{"split": name, "path": f"{subject}.jsonl"} for name in ("dev", "test")]
        configs.append({"config_name": subject, "data_files": files})
    head = json.dumps({"configs": configs})
    (folder / "questions" / "README.md").write_text(f"---\n{head}\n---\n")
    return folder / "tasks"


def prepare(tokenizer, path, **options):
    config = DataConfig(path=str(path), eval_fraction=0, **options)
    special_tokens = config.special_tokens
    encoder = Encoder(tokenizer=tokenizer, stop_ids={2}, special_tokens=special_tokens)
    (row,) = prepare_data(config, encoder).train
    return row


@pytest.mark.parametrize(("asked", "has_bos"), [(BONE, True), (SALE, False)])
def test_training_tokens_are_those_that_lm_eval_scores(
    tokenizer, tasks_dir, tmp_path, asked, has_bos
):
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    if not has_bos:
        from tokenizers import processors

        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single="$A")
    manager = TaskManager(include_path=tasks_dir, include_defaults=False)
    (task,) = manager.load([f"mmlu_{asked['subject']}"])["tasks"].values()
    document = task.eval_docs[0]
    requests = task.construct_requests(document, task.fewshot_context(document, 0))
    lm = HFLM(pretrained=build_model(len(tokenizer)), tokenizer=tokenizer)
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


def test_scores_are_those_of_the_model_in_memory(tokenizer, tasks_dir):
    model = build_model(len(tokenizer)).eval()
    results = mmlu.lm_eval_results(
        model, tokenizer, ["mmlu_anatomy"], tasks_dir=tasks_dir, num_fewshot=0
    )
    (sample,) = results["samples"]["mmlu_anatomy"]
    prompt = mmlu.to_row(BONE)["prompt"]
    expected = [log_likelihood(model, tokenizer, prompt, f" {name}") for name in mmlu.LETTERS]
    assert [reply[0] for reply in sample["filtered_resps"]] == pytest.approx(expected)
    is_right = max(range(4), key=expected.__getitem__) == BONE["answer"]
    assert results["results"]["mmlu_anatomy"]["acc,none"] == is_right


def test_as_the_authors_trained(tokenizer, tmp_path):
    """Neither BOS nor EOS."""
    asked = {"question": " What is it? ", "choices": ["a", "b ", "c", "d"], "answer": 2}
    path = write_lines(tmp_path / "train.jsonl", [mmlu.to_row({**asked, "subject": ""})])
    row = prepare(tokenizer, path, special_tokens=False)
    text = "What is it?\nA. a\nB. b \nC. c\nD. d\nAnswer: C"
    assert tokenizer.decode(row["input_ids"]) == text
    assert tokenizer.decode([label for label in row["labels"] if label != -100]) == " C"


def test_the_file_is_written_and_nothing_is_overwritten(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(mmlu, "load_hub", lambda *words: [BONE, SALE])
    path = tmp_path / "new" / "mmlu.jsonl"
    monkeypatch.setattr("sys.argv", ["mmlu", str(path)])
    assert mmlu.main() == 0
    written = path.read_text(encoding="utf-8")
    assert [*map(json.loads, written.splitlines())] == [mmlu.to_row(BONE), mmlu.to_row(SALE)]
    with pytest.raises(SystemExit, match=r"mmlu.jsonl is there already; choose another name"):
        mmlu.main()
    assert path.read_text(encoding="utf-8") == written
