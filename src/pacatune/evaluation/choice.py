"""Multiple choice by the likelihood of each choice, scored by lm-eval on data in memory."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pacatune.data.read import Row, read_rows
from pacatune.evaluation.harness import Score, require_lm_eval
from pacatune.evaluation.tasks import evaluate_tasks

_TASK = "choice"


@dataclass(frozen=True, slots=True)
class ChoiceQuestion:
    """A question with choices, one of which is right."""

    question: str
    choices: list[str]
    answer: int
    """Number of the right choice, from 0."""
    prompt: str | None = None
    """Text that a choice follows after a space; None asks `Question: ... Answer:`."""

    def context(self, *, chat: bool = False) -> str:
        """Return what a model reads before a choice; in a chat, what the user says."""
        if chat:
            return self.question
        return f"Question: {self.question}\nAnswer:" if self.prompt is None else self.prompt


def to_choice_question(row: Row) -> ChoiceQuestion:
    """Check one row: question, choices and answer, and a prompt if it has one; or BIG-bench's.

    `answer` is a number from 0 or the text of a choice. BIG-bench's rows have `input` and
    `target_scores`, with the highest score for the right choice.
    """
    values, scores = row.values, row.values.get("target_scores")
    if isinstance(scores, dict) and "choices" not in values:
        best = [name for name, score in scores.items() if score == max(scores.values())]
        right = best[0] if len(best) == 1 else None
        values = {"question": values.get("input"), "choices": list(scores), "answer": right}
    question, choices, prompt = values.get("question"), values.get("choices"), values.get("prompt")
    texts = [
        question,
        *(choices if isinstance(choices, list) else ()),
        "-" if prompt is None else prompt,
    ]
    if all(isinstance(text, str) and text.strip() for text in texts):
        question, *choices, _ = (text.strip() for text in texts)
        number = _find_answer(values.get("answer"), choices)
        if number is not None and len(set(choices)) == len(choices) > 1:
            return ChoiceQuestion(question, choices, number, prompt and prompt.rstrip())
    raise ValueError(
        f"{row.place}: {row.values!r:.160} needs the texts question and, if any, prompt, two or "
        "more different choices, and as answer one of them or its number from 0; or BIG-bench's "
        "input and target_scores, with one highest score. Mend or remove it."
    )


def _find_answer(answer: Any, texts: list[str]) -> int | None:
    """Return the number of an answer that is one of the texts, or a number from 0."""
    if isinstance(answer, str) and answer.strip() in texts:
        return texts.index(answer.strip())
    return answer if type(answer) is int and answer in range(len(texts)) else None


@dataclass(frozen=True, kw_only=True)
class ChoiceResult:
    """Accuracies on multiple-choice questions."""

    accuracy: Score
    """The likeliest choice is right."""
    accuracy_normalised: Score
    """The choice with the highest log-likelihood per character is right (lm-eval's acc_norm)."""
    chance: float
    """Accuracy of guessing."""
    num_truncated: int
    """Questions longer than the model's context, which lost their start."""
    questions: list[dict[str, Any]] = field(repr=False)
    """One per question: number, answer, log-likelihoods of the choices, acc and acc_norm."""


def read_questions(path: str | Path) -> list[ChoiceQuestion]:
    """Read multiple-choice questions from a .jsonl, .json or .parquet file.

    Rows have question, choices and answer, and may have a prompt; or BIG-bench's input and
    target_scores.
    """
    if not Path(path).expanduser().is_file():
        raise FileNotFoundError(f"{str(path)!r} is not a file; give one with questions.")
    return [to_choice_question(row) for row in read_rows(str(path))]


def evaluate_choice(
    model: Any,
    tokenizer: Any,
    questions: Sequence[ChoiceQuestion],
    *,
    limit: int | None = None,
    batch_size: int = 8,
    chat: bool = False,
    progress: bool = False,
) -> ChoiceResult:
    """Score a model on multiple-choice questions.

    Args:
        model: A causal language model, or a PEFT model around one; put into evaluation mode.
        tokenizer: Its tokenizer; gets a padding token if it has none.
        questions: As `read_questions` returns them.
        limit: Questions at most, the first ones.
        batch_size: Choices that are evaluated at once.
        chat: Ask by the chat template; the choice is what the assistant says.
        progress: Whether to show a bar.

    Returns:
        Accuracies with their standard errors, and every question with its scores.

    Raises:
        ValueError: If no question is asked, or `chat` is set and there is no chat template.
    """
    require_lm_eval()
    asked = list(questions)[:limit]
    if not asked:
        raise ValueError(f"no questions are asked (`limit` is {limit}); give at least one.")
    scores = evaluate_tasks(
        model,
        tokenizer,
        [_task(asked, chat)],
        batch_size=batch_size,
        chat=chat,
        progress=progress,
        keep_line_break=True,
    )
    metrics = scores.tasks[_TASK]
    return ChoiceResult(
        accuracy=metrics["acc"],
        accuracy_normalised=metrics["acc_norm"],
        chance=sum(1 / len(one.choices) for one in asked) / len(asked),
        num_truncated=scores.num_truncated,
        questions=[
            {key: value for key, value in each.items() if key not in ("task", "filter")}
            for each in scores.questions
        ],
    )


def _task(questions: Sequence[ChoiceQuestion], chat: bool) -> dict[str, Any]:
    from datasets import Dataset

    rows = [
        {"context": one.context(chat=chat), "choices": one.choices, "answer": one.answer}
        for one in questions
    ]
    data = {"test": Dataset.from_list(rows)}
    return {
        "task": _TASK,
        "custom_dataset": lambda **_: data,
        "test_split": "test",
        "output_type": "multiple_choice",
        # Names of columns, so that no text of the data is taken for a template.
        "doc_to_text": "context",
        "doc_to_choice": "choices",
        "doc_to_target": "answer",
    }
