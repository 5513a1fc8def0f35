"""Questions, references, judge prompts and a judge, all in this process."""

import json
from functools import partial

import httpx2
import openai
import pytest

from experiments.mt_bench.questions import add_references, read_prompts, read_questions
from tests.experiments.mt_bench.fake_judge import FakeJudge

CATEGORIES = ("writing", "math", "stem", "coding")
TWO = "First: {question_1} {answer_1} Then: {question_2} {answer_2}"
PROMPTS = {
    "single-v1": ("Be kind.", "{question} {answer}"),
    "single-math-v1": ("Be kind.", "{question} {ref_answer_1} {answer}"),
    "single-v1-multi-turn": ("Look at the second answer.", TWO),
    "single-math-v1-multi-turn": ("Look at it.", "{ref_answer_1} {ref_answer_2} " + TWO),
}


def write_lines(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def question_rows(categories=CATEGORIES, number=2):
    return [
        {
            "question_id": 10 * place + index + 1,
            "category": category,
            "turns": [f"What is {category} {index}?", f"And {index}, {{why}}?"],
        }
        for place, category in enumerate(categories)
        for index in range(number)
    ]


def answer_row(question, *turns):
    choices = [{"index": 0, "turns": list(turns)}]
    return {"question_id": question, "model_id": "a", "choices": choices, "answer_id": "x"}


def prompt_rows():
    names = ("system_prompt", "prompt_template")
    more = {"type": "single", "output_format": "[[rating]]"}
    return [
        {"name": name, **dict(zip(names, texts, strict=True)), **more}
        for name, texts in PROMPTS.items()
    ]


@pytest.fixture
def files(tmp_path):
    rows = question_rows()
    numbers = [row["question_id"] for row in rows if row["category"] in ("math", "coding")]
    references = [answer_row(number, "reference one", "reference two") for number in numbers]
    return {
        "questions": str(write_lines(tmp_path / "questions.jsonl", rows)),
        "references": str(write_lines(tmp_path / "references.jsonl", references)),
        "judge_prompts": write_lines(tmp_path / "prompts.jsonl", prompt_rows()),
    }


@pytest.fixture
def prompts(files):
    return read_prompts(files["judge_prompts"])


@pytest.fixture
def questions(files):
    return add_references(read_questions(files["questions"]), files["references"])


@pytest.fixture
def judge(monkeypatch):
    """A judge that openai's client asks."""
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.01)
    judge = FakeJudge()
    client = httpx2.Client(transport=httpx2.MockTransport(judge.answer))
    monkeypatch.setattr(openai, "OpenAI", partial(openai.OpenAI, http_client=client))
    return judge
