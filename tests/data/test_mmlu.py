"""Questions of MMLU are trained on in the tokens that lm-eval scores."""

import pytest

from pacatune.data import DataConfig, prepare_data
from pacatune.data.formats import to_examples
from pacatune.data.read import Row
from tests.data.conftest import write_lines
from tests.evaluation.mmlu import LETTERS, write_mmlu

MMLU_ROW = {"question": " What is it? ", "choices": ["a", "b ", "c", "d"], "answer": 2}
BONE = {"question": " Which bone is longest?\nThink. ", "answer": 3, "subject": "anatomy"}
BONE["choices"] = ["Femur", " Skull", "Rib\n", "Été"]
SALE = {"question": "What sells?", "answer": 0, "subject": "high_school_world_history"}
SALE["choices"] = ["{{ 1 }}", "2", "3", "4"]


@pytest.fixture(scope="module")
def tasks_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mmlu") / "tasks"
    return write_mmlu(folder, questions={one["subject"]: [one] for one in (BONE, SALE)})


def prepare(tokenizer, path, format="mmlu", **options):
    config = DataConfig(path=str(path), format=format, eval_fraction=0, **options)
    return prepare_data(config, tokenizer, max_length=None, stop_ids={2}).train


def read(values, place="here"):
    (example,) = to_examples([Row(place, values)], "mmlu")
    return example


@pytest.mark.parametrize(("one", "has_bos"), [(BONE, True), (SALE, False)])
def test_training_tokens_are_those_that_lm_eval_scores(
    tokenizer, tasks_dir, tmp_path, one, has_bos
):
    from pacatune.evaluation.language_model import LanguageModel
    from pacatune.evaluation.tasks import prepare_tasks
    from tests.conftest import build_model

    if not has_bos:
        from tokenizers import processors

        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single="$A")
    (task,) = prepare_tasks([f"mmlu_{one['subject']}"], tasks_dir)
    asked = task.eval_docs[0]
    requests = task.construct_requests(asked, task.fewshot_context(asked, 0))
    lm = LanguageModel(build_model(len(tokenizer)), tokenizer)
    context, answer = lm._encode_pair(*requests[asked["answer"]].args)
    (row,) = prepare(tokenizer, write_lines(tmp_path / "train.jsonl", [one]))
    learned = [*answer, tokenizer.eos_token_id]
    assert row["input_ids"] == [*context, *learned]
    assert row["labels"] == [-100] * len(context) + learned
    assert (row["input_ids"][0] == tokenizer.bos_token_id) is has_bos
    # Without a subject there is no description.
    named, nameless = read(one), read({**one, "subject": ""})
    assert nameless.prompt == task.doc_to_text(one)
    assert named.prompt == task.config.description + nameless.prompt
    assert nameless.completion == f" {task.doc_to_choice(one)[one['answer']]}"


def test_as_the_authors_trained(tokenizer, tmp_path):
    """Neither BOS nor EOS."""
    path = write_lines(tmp_path / "train.jsonl", [MMLU_ROW])
    (row,) = prepare(tokenizer, path, special_tokens=False)
    text = "What is it?\nA. a\nB. b \nC. c\nD. d\nAnswer: C"
    assert tokenizer.decode(row["input_ids"]) == text
    assert tokenizer.decode([label for label in row["labels"] if label != -100]) == " C"


def test_all_layouts_of_a_question_say_the_same(tokenizer, tmp_path):
    """CSV with and without a header, nested rows, and Parquet; `auto` knows the columns."""
    from datasets import Dataset

    (tmp_path / "a.csv").write_text("What is it?,a,b ,c,d,C\n")
    (tmp_path / "b.csv").write_text("question,A,B,C,D,answer\nWhat is it?,a,b ,c,d,C\n")
    write_lines(tmp_path / "c.jsonl", [{"train": {**MMLU_ROW, "subject": ""}}])
    Dataset.from_list([MMLU_ROW]).to_parquet(tmp_path / "d.parquet")
    names = ("a.csv", "b.csv", "c.jsonl", "d.parquet")
    tables = [prepare(tokenizer, tmp_path / name) for name in names]
    tables.append(prepare(tokenizer, tmp_path / "d.parquet", format="auto"))
    encoded = [(table["input_ids"][:], table["labels"][:]) for table in tables]
    assert len(tables[0]) == 1
    assert all(each == encoded[0] for each in encoded)


def test_answers_are_letters_or_numbers():
    for number, letter in enumerate(LETTERS):
        for answer in (number, letter):
            assert read({**MMLU_ROW, "answer": answer}).completion == f" {letter}"
    wrong = {"question": [None, " "], "answer": ["E", 4, True, None]}
    wrong["choices"] = [None, ["a", "b"], ["a", "b", "c", None]]
    message = r"data.jsonl, row 7: .* needs the text question, four texts as choices, and as answer"
    for name, value in ((name, value) for name, values in wrong.items() for value in values):
        with pytest.raises(ValueError, match=message):
            read({**MMLU_ROW, name: value}, "data.jsonl, row 7")
