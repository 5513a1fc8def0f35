"""Questions of MMLU: read them in the layouts they come in, write them as lm-eval asks them.

Training and evaluation see the same prompt: the words of lm-eval 0.4's task `mmlu`.
"""

from dataclasses import asdict, dataclass
from typing import Any

from pacatune.data.read import Row

LETTERS = "ABCD"
CSV_COLUMNS = ("question", *LETTERS, "answer")
"""Columns of the original files, which have no header."""

_DESCRIPTION = "The following are multiple choice questions (with answers) about {subject}.\n\n"


@dataclass(frozen=True, slots=True)
class Question:
    """A question with four choices."""

    question: str
    choices: list[str]
    answer: int
    """Number of the right choice, from 0."""
    subject: str = ""
    """With underscores, such as `high_school_physics`; empty where it is not known."""

    def to_dict(self) -> dict[str, Any]:
        """Return the columns of the hub's `cais/mmlu`."""
        return asdict(self)

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
    """Check one row, in the columns of `cais/mmlu` or of the original CSV files.

    Args:
        row: With question, choices and answer; or question, A, B, C, D and answer. The hub's
            configuration `auxiliary_train` has them below `train`.
        subject: Where the row does not name one.

    Raises:
        ValueError: If a field is missing or wrong; names the file and row.
    """
    values = row.values
    if isinstance(nested := values.get("train"), dict) and "question" not in values:
        values = nested
    choices: Any = values.get("choices")
    if choices is None and any(letter in values for letter in LETTERS):
        choices = [values.get(letter) for letter in LETTERS]
    question = values.get("question")
    if not isinstance(question, str) or not question.strip():
        raise ValueError(
            f"{row.place}: 'question' is {_show(question)}; it must be a text. The file may be cut "
            "off here; mend or remove the row."
        )
    is_list = isinstance(choices, list) and len(choices) == len(LETTERS)
    if not is_list or not all(isinstance(choice, str) for choice in choices):
        raise ValueError(
            f"{row.place}: the choices are {_show(choices)}; they must be four texts. The file may "
            "be cut off here; mend or remove the row."
        )
    return Question(
        question, choices, _answer(values, row.place), str(values.get("subject") or subject)
    )


def _answer(values: dict[str, Any], place: str) -> int:
    answer = values.get("answer")
    if isinstance(answer, str) and len(answer.strip()) == 1 and answer.strip() in LETTERS:
        return LETTERS.index(answer.strip())
    if isinstance(answer, int) and not isinstance(answer, bool) and answer in range(len(LETTERS)):
        return answer
    raise ValueError(
        f"{place}: 'answer' is {_show(answer)}; it must be A, B, C or D, or a number from 0 to 3. "
        "The file may be cut off here; mend or remove the row."
    )


def _show(value: Any) -> str:
    return "missing" if value is None else f"{value!r:.60}"
