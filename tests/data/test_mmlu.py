import copy
import json

import pytest

from pacatune.data import DataConfig, prepare_data
from pacatune.data.formats import to_examples
from pacatune.data.read import Row
from tests.evaluation.mmlu import LETTERS, write_mmlu

MMLU_ROW = {"question": " What is it? ", "choices": ["a", "b ", "c", "d"], "answer": 2}
QUESTIONS = [
    {
        "question": " Which bone is longest?\nThink. ",
        "choices": ["Femur", " Skull", "Rib\n", "Été"],
        "answer": 3,
        "subject": "anatomy",
    },
    {
        "question": "What sells?",
        "choices": ["{{ 1 }}", "2", "3", "4"],
        "answer": 0,
        "subject": "high_school_world_history",
    },
]


@pytest.fixture
def tokenizer(tiny_tokenizer):
    return copy.deepcopy(tiny_tokenizer)


@pytest.fixture(scope="module")
def tasks_dir(tmp_path_factory):
    """lm-eval's own tasks on two questions."""
    folder = tmp_path_factory.mktemp("mmlu") / "tasks"
    return write_mmlu(folder, questions={one["subject"]: [one] for one in QUESTIONS})


def prepare(tokenizer, path, **options):
    config = DataConfig(path=str(path), format="mmlu", eval_fraction=0, **options)
    return prepare_data(config, tokenizer, max_length=None, stop_ids={2})


def read(values, place="here"):
    (example,) = to_examples([Row(place, values)], "mmlu")
    return example


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def scored_tokens(tokenizer, tasks_dir, subject):
    """Tokens of prompt and right answer as lm-eval scores them, without examples."""
    from pacatune.evaluation.language_model import LanguageModel
    from pacatune.evaluation.tasks import prepare_tasks
    from tests.conftest import build_model

    (task,) = prepare_tasks([f"mmlu_{subject}"], tasks_dir)
    asked = task.eval_docs[0]
    requests = task.construct_requests(asked, task.fewshot_context(asked, 0))
    lm = LanguageModel(build_model(len(tokenizer)), tokenizer)
    return lm._encode_pair(*requests[asked["answer"]].args)


@pytest.mark.parametrize("has_bos", [True, False])
@pytest.mark.parametrize("number", [0, 1])
def test_training_tokens_are_those_that_lm_eval_scores(
    tokenizer, tasks_dir, tmp_path, number, has_bos
):
    if not has_bos:
        from tokenizers import processors

        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single="$A")
    one = QUESTIONS[number]
    context, answer = scored_tokens(tokenizer, tasks_dir, one["subject"])
    path = write(tmp_path / "train.jsonl", [one])
    (row,) = prepare(tokenizer, path).train
    assert row["input_ids"] == [*context, *answer, tokenizer.eos_token_id]
    learned = [*answer, tokenizer.eos_token_id]
    assert row["labels"] == [-100] * len(context) + learned
    assert (row["input_ids"][0] == tokenizer.bos_token_id) is has_bos


def test_questions_without_subject_have_no_description(tokenizer, tasks_dir):
    from pacatune.evaluation.tasks import prepare_tasks

    for one in QUESTIONS:
        (task,) = prepare_tasks([f"mmlu_{one['subject']}"], tasks_dir)
        named, nameless = (read({**one, "subject": name}) for name in (one["subject"], ""))
        assert nameless.prompt == task.doc_to_text(one)
        assert named.prompt == task.config.description + nameless.prompt
        assert nameless.completion == f" {task.doc_to_choice(one)[one['answer']]}"


def test_as_the_authors_trained(tokenizer, tmp_path):
    """Neither BOS nor EOS."""
    path = write(tmp_path / "train.jsonl", [MMLU_ROW])
    (row,) = prepare(tokenizer, path, special_tokens=False).train
    text = "What is it?\nA. a\nB. b \nC. c\nD. d\nAnswer: C"
    assert tokenizer.decode(row["input_ids"]) == text
    assert tokenizer.decode([label for label in row["labels"] if label != -100]) == " C"


def test_csv_without_header_and_nested_rows_and_parquet_say_the_same(tokenizer, tmp_path):
    from datasets import Dataset

    (tmp_path / "a.csv").write_text("What is it?,a,b ,c,d,C\n")
    (tmp_path / "b.csv").write_text("question,A,B,C,D,answer\nWhat is it?,a,b ,c,d,C\n")
    write(tmp_path / "c.jsonl", [{"train": {**MMLU_ROW, "subject": ""}}])
    Dataset.from_list([MMLU_ROW]).to_parquet(tmp_path / "d.parquet")
    encoded = [
        prepare(tokenizer, tmp_path / name).train["input_ids"][:]
        for name in ("a.csv", "b.csv", "c.jsonl", "d.parquet")
    ]
    assert len(encoded[0]) == 1
    assert all(each == encoded[0] for each in encoded)


def test_format_is_found_from_the_columns(tokenizer, tmp_path):
    path = write(tmp_path / "train.jsonl", [MMLU_ROW])
    config = DataConfig(path=str(path), eval_fraction=0)
    auto = prepare_data(config, tokenizer, max_length=None, stop_ids={2}).train
    assert auto["labels"][:] == prepare(tokenizer, path).train["labels"][:]


@pytest.mark.parametrize("number", range(4))
def test_answers_are_letters_or_numbers(number):
    for answer in (number, LETTERS[number]):
        assert read({**MMLU_ROW, "answer": answer}).completion == f" {LETTERS[number]}"


@pytest.mark.parametrize(
    "change",
    [
        {"question": None},
        {"question": " "},
        {"choices": ["a", "b"]},
        {"choices": ["a", "b", "c", None]},
        {"choices": None},
        {"answer": "E"},
        {"answer": 4},
        {"answer": True},
        {"answer": None},
    ],
)
def test_wrong_rows_of_mmlu(change):
    with pytest.raises(ValueError, match=r"data.jsonl, row 7: .* needs the text question, four"):
        read({**MMLU_ROW, **change}, "data.jsonl, row 7")
