import copy
import json
from dataclasses import asdict

import pytest

from pacatune.data import DataConfig, prepare_data
from pacatune.data.choices import LETTERS, Question, to_question
from pacatune.data.read import Row
from pacatune.evaluation.choice import ChoiceQuestion, to_choice_question
from tests.evaluation.mmlu import write_mmlu

ROW = {"question": "Who?", "choices": ["Ann", " Bob "], "answer": 1}


def test_own_and_big_bench_rows_say_the_same():
    expected = ChoiceQuestion("Who?", ["Ann", "Bob"], 1)
    scores = {"input": "Who? ", "target_scores": {"Ann": 0, "Bob": 1}}
    for values in (ROW, {**ROW, "answer": "Bob"}, scores):
        assert to_choice_question(Row("here", values)) == expected
    assert expected.context() == "Question: Who?\nAnswer:"
    assert expected.context(chat=True) == "Who?"


@pytest.mark.parametrize(
    "values",
    [
        {"choices": ["a", "b"], "answer": 0},
        {**ROW, "question": ""},
        {**ROW, "choices": ["a"]},
        {**ROW, "choices": ["a", " "]},
        {**ROW, "choices": ["a", "a "]},
        {**ROW, "answer": 2},
        {**ROW, "answer": True},
        {**ROW, "prompt": 3},
        {"input": "q", "target_scores": {}},
        {"input": "q", "target_scores": {"a": 1, "b": 1}},
    ],
)
def test_wrong_rows(values):
    with pytest.raises(ValueError, match=r"x.jsonl, row 3: .* needs the texts question and, if"):
        to_choice_question(Row("x.jsonl, row 3", values))


MMLU_ROW = {"question": " What is it? ", "choices": ["a", "b ", "c", "d"], "answer": 2}
QUESTIONS = [
    Question(" Which bone is longest?\nThink. ", ["Femur", " Skull", "Rib\n", "Été"], 3, "anatomy"),
    Question("What sells?", ["{{ 1 }}", "2", "3", "4"], 0, "high_school_world_history"),
]


@pytest.fixture
def tokenizer(tiny_tokenizer):
    return copy.deepcopy(tiny_tokenizer)


@pytest.fixture(scope="module")
def tasks_dir(tmp_path_factory):
    """lm-eval's own tasks on two questions."""
    folder = tmp_path_factory.mktemp("mmlu") / "tasks"
    return write_mmlu(folder, questions={one.subject: [asdict(one)] for one in QUESTIONS})


def prepare(tokenizer, path, **options):
    config = DataConfig(path=str(path), format="mmlu", eval_fraction=0, **options)
    return prepare_data(config, tokenizer, max_length=None, stop_ids={2})


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
    context, answer = scored_tokens(tokenizer, tasks_dir, one.subject)
    path = write(tmp_path / "train.jsonl", [asdict(one)])
    (row,) = prepare(tokenizer, path).train
    assert row["input_ids"] == [*context, *answer, tokenizer.eos_token_id]
    learned = [*answer, tokenizer.eos_token_id]
    assert row["labels"] == [-100] * len(context) + learned
    assert (row["input_ids"][0] == tokenizer.bos_token_id) is has_bos


def test_questions_without_subject_have_no_description(tokenizer, tasks_dir):
    from pacatune.evaluation.tasks import prepare_tasks

    for one in QUESTIONS:
        (task,) = prepare_tasks([f"mmlu_{one.subject}"], tasks_dir)
        nameless = Question(one.question, one.choices, one.answer)
        assert nameless.prompt() == task.doc_to_text(asdict(one))
        assert one.prompt() == task.config.description + nameless.prompt()
        assert nameless.completion() == f" {task.doc_to_choice(asdict(one))[one.answer]}"


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
        question = to_question(Row("here", {**MMLU_ROW, "answer": answer}))
        assert question.completion() == f" {LETTERS[number]}"


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
        to_question(Row("data.jsonl, row 7", {**MMLU_ROW, **change}))
