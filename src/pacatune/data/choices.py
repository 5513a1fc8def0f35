"""Questions with choices, of any number and MMLU's four: read, check and write them.

Training and evaluation see the same prompt; MMLU's has the words of lm-eval 0.4's task `mmlu`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pacatune.data.read import Row

LETTERS = "ABCD"
CSV_COLUMNS = ("question", *LETTERS, "answer")
"""Columns of MMLU's original files, which have no header."""

_DESCRIPTION = "The following are multiple choice questions (with answers) about {subject}.\n\n"


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
    values = row.values
    scores = values.get("target_scores")
    if isinstance(scores, dict) and "choices" not in values:
        best = [name for name, score in scores.items() if score == max(scores.values())]
        answer = best[0] if len(best) == 1 else None
        values = {**values, "question": values.get("input"), "answer": answer}
        values["choices"] = list(scores)
    question, choices, prompt = values.get("question"), values.get("choices"), values.get("prompt")
    is_right = _is_text(question) and (prompt is None or _is_text(prompt))
    if is_right and isinstance(choices, list) and all(map(_is_text, choices)):
        choices = [choice.strip() for choice in choices]
        number = _find_answer(values.get("answer"), choices)
        if number is not None and len(set(choices)) == len(choices) > 1:
            return ChoiceQuestion(
                str(question).strip(), choices, number, prompt and prompt.rstrip()
            )
    raise ValueError(
        f"{row.place}: {row.values!r:.160} needs the texts question and, if any, prompt, two or "
        "more different choices, and as answer one of them or its number from 0; or BIG-bench's "
        "input and target_scores, with one highest score. Mend or remove it."
    )


@dataclass(frozen=True, slots=True)
class Question:
    """A question of MMLU, with four choices."""

    question: str
    choices: list[str]
    answer: int
    """Number of the right choice, from 0."""
    subject: str = ""
    """With underscores, such as `high_school_physics`; empty where it is not known."""

    def prompt(self) -> str:
        """Return the question as lm-eval asks it without examples, up to `Answer:`."""
        listed = "".join(f"\n{letter}. {self.choices[i]}" for i, letter in enumerate(LETTERS))
        about = self.subject.replace("_", " ")
        start = _DESCRIPTION.format(subject=about) if about else ""
        return f"{start}{self.question.strip()}{listed}\nAnswer:"

    def completion(self) -> str:
        """Return what follows the prompt: a space and the letter of the answer."""
        return f" {LETTERS[self.answer]}"


def to_question(row: Row, subject: str = "") -> Question:
    """Check one row of MMLU; `subject` is for rows that do not name one.

    It has the columns of `cais/mmlu` (question, choices, answer; below `train` in the configuration
    `auxiliary_train`) or of the original CSV files.
    """
    values = row.values
    if isinstance(nested := values.get("train"), dict) and "question" not in values:
        values = nested
    question, choices = values.get("question"), values.get("choices")
    if choices is None:
        choices = [values.get(letter) for letter in LETTERS]
    answer = _find_answer(values.get("answer"), LETTERS)
    if (
        not (_is_text(question) and isinstance(choices, list) and len(choices) == len(LETTERS))
        or not all(isinstance(choice, str) for choice in choices)
        or answer is None
    ):
        raise ValueError(
            f"{row.place}: {values!r:.160} needs the text question, four texts as choices, and as "
            "answer A, B, C or D, or a number from 0 to 3. The file may be cut off here; mend or "
            "remove the row."
        )
    return Question(str(question), choices, answer, str(values.get("subject") or subject))


def _find_answer(answer: Any, texts: Sequence[str]) -> int | None:
    """Return the number of an answer that is one of the texts, or a number from 0."""
    known = list(texts)
    if isinstance(answer, str) and answer.strip() in known:
        return known.index(answer.strip())
    return answer if type(answer) is int and answer in range(len(known)) else None


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())
