"""Questions of MMLU: training and evaluation see the same prompt, that of lm-eval 0.4."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pacatune.data.read import Row

LETTERS = "ABCD"

_DESCRIPTION = "The following are multiple choice questions (with answers) about {subject}.\n\n"


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
    nested = row.values.get("train")
    values = nested if isinstance(nested, dict) and "question" not in row.values else row.values
    question, choices = values.get("question"), values.get("choices")
    choices = [values.get(letter) for letter in LETTERS] if choices is None else choices
    answer = find_answer(values.get("answer"), LETTERS)
    texts = [question, *choices] if isinstance(choices, list) else []
    is_text = all(isinstance(text, str) for text in texts) and bool(str(question).strip())
    if not is_text or len(texts) != 1 + len(LETTERS) or answer is None:
        raise ValueError(
            f"{row.place}: {values!r:.160} needs the text question, four texts as choices, and as "
            "answer A, B, C or D, or a number from 0 to 3. The file may be cut off here; mend or "
            "remove the row."
        )
    return Question(str(question), choices, answer, str(values.get("subject") or subject))


def find_answer(answer: Any, texts: Sequence[str]) -> int | None:
    """Return the number of an answer that is one of the texts, or a number from 0."""
    known = list(texts)
    if isinstance(answer, str) and answer.strip() in known:
        return known.index(answer.strip())
    return answer if type(answer) is int and answer in range(len(known)) else None
