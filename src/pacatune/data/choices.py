"""Questions with choices, of any number and MMLU's four: read, check and write them.

Training and evaluation see the same prompt; MMLU's has the words of lm-eval 0.4's task `mmlu`.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from pacatune.data.read import Row


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
    values, place = row.values, row.place
    if "target_scores" in values and "choices" not in values:
        values = _from_scores(values, place)
    if missing := [name for name in ("question", "choices", "answer") if name not in values]:
        raise ValueError(
            f"{place}: columns {sorted(values)} lack {' and '.join(map(repr, missing))}; a row "
            "needs question, choices and answer, or BIG-bench's input and target_scores."
        )
    question, choices, prompt = values["question"], values["choices"], values.get("prompt")
    if not _is_text(question):
        raise ValueError(f"{place}: 'question' is {question!r:.60}; it must be a text.")
    if not isinstance(choices, list) or len(choices) < 2 or not all(map(_is_text, choices)):
        raise ValueError(f"{place}: 'choices' is {choices!r:.60}; it must list two texts or more.")
    choices = [choice.strip() for choice in choices]
    if len(set(choices)) < len(choices):
        raise ValueError(f"{place}: two of the choices {choices!r:.80} are the same; remove one.")
    if prompt is not None and not _is_text(prompt):
        raise ValueError(f"{place}: 'prompt' is {prompt!r:.60}; it must be a text, or left out.")
    answer = _find_answer(values["answer"], choices)
    if answer is None:
        raise ValueError(
            f"{place}: 'answer' is {values['answer']!r:.60}; it must be one of the choices, or its "
            f"number from 0 to {len(choices) - 1}."
        )
    return ChoiceQuestion(question.strip(), choices, answer, prompt and prompt.rstrip())


def _from_scores(values: dict[str, Any], place: str) -> dict[str, Any]:
    scores = values["target_scores"]
    if (
        not isinstance(scores, dict)
        or not scores
        or not all(isinstance(score, int | float) for score in scores.values())
    ):
        raise ValueError(
            f"{place}: 'target_scores' is {scores!r:.60}; it must give each choice a number."
        )
    best = [choice for choice, score in scores.items() if score == max(scores.values())]
    if len(best) != 1:
        raise ValueError(
            f"{place}: {len(best)} choices have the highest of 'target_scores'; one must be right."
        )
    return {
        "question": values.get("input"),
        "choices": list(scores),
        "answer": list(scores).index(best[0]),
        "prompt": values.get("prompt"),
    }


LETTERS = "ABCD"
CSV_COLUMNS = ("question", *LETTERS, "answer")
"""Columns of MMLU's original files, which have no header."""

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
    """Check one row of MMLU; `subject` is for rows that do not name one.

    It has the columns of `cais/mmlu` (question, choices, answer; below `train` in the configuration
    `auxiliary_train`) or of the original CSV files.
    """
    values = row.values
    if isinstance(nested := values.get("train"), dict) and "question" not in values:
        values = nested
    choices: Any = values.get("choices")
    if choices is None and any(letter in values for letter in LETTERS):
        choices = [values.get(letter) for letter in LETTERS]
    question, answer = values.get("question"), _find_answer(values.get("answer"), tuple(LETTERS))
    is_list = isinstance(choices, list) and len(choices) == len(LETTERS)
    if not _is_text(question):
        problem = f"'question' is {_show(question)}; it must be a text."
    elif not is_list or not all(isinstance(choice, str) for choice in choices):
        problem = f"the choices are {_show(choices)}; they must be four texts."
    elif answer is None:
        problem = (
            f"'answer' is {_show(values.get('answer'))}; it must be A, B, C or D, or a number from "
            "0 to 3."
        )
    else:
        return Question(str(question), choices, answer, str(values.get("subject") or subject))
    raise ValueError(
        f"{row.place}: {problem} The file may be cut off here; mend or remove the row."
    )


def _find_answer(answer: Any, texts: Sequence[str]) -> int | None:
    """Return the number of an answer that is one of the texts, or a number from 0."""
    if isinstance(answer, str) and answer.strip() in texts:
        return texts.index(answer.strip())
    if isinstance(answer, int) and not isinstance(answer, bool) and answer in range(len(texts)):
        return answer
    return None


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _show(value: Any) -> str:
    return "missing" if value is None else f"{value!r:.60}"
