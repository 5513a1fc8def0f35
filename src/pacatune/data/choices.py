"""Multiple-choice questions: read and check them, and write them to train on or to score."""

from dataclasses import dataclass
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

    def row(self, *, chat: bool = False) -> dict[str, Any]:
        """Return a row of JSON Lines that can be trained on and scored.

        Args:
            chat: As `messages`, for models with a chat template; else as `prompt` and `completion`.
        """
        answer = self.choices[self.answer]
        asked = {"question": self.question, "choices": self.choices, "answer": self.answer}
        if not chat:
            return {"prompt": self.context(), "completion": f" {answer}", **asked}
        messages = [
            {"role": "user", "content": self.question},
            {"role": "assistant", "content": answer},
        ]
        return {"messages": messages, **asked}


def to_choice_question(row: Row) -> ChoiceQuestion:
    """Check one row: question, choices and answer, and a prompt if it has one; or BIG-bench's.

    Args:
        row: `answer` is a number from 0 or the text of a choice. BIG-bench's rows have `input` and
            `target_scores`, with the highest score for the right choice.

    Raises:
        ValueError: If a field is missing or wrong; names the file and row.
    """
    values, place = row.values, row.place
    if "target_scores" in values and "choices" not in values:
        values = _from_scores(values, place)
    if missing := [name for name in ("question", "choices", "answer") if name not in values]:
        raise ValueError(
            f"{place}: columns {sorted(values)} lack {' and '.join(map(repr, missing))}; a row "
            "needs question, choices and answer, or BIG-bench's input and target_scores."
        )
    question, choices = values.get("question"), values.get("choices")
    if not isinstance(question, str) or not question.strip():
        raise ValueError(f"{place}: 'question' is {question!r:.60}; it must be a text.")
    if (
        not isinstance(choices, list)
        or len(choices) < 2
        or not all(isinstance(choice, str) and choice.strip() for choice in choices)
    ):
        raise ValueError(f"{place}: 'choices' is {choices!r:.60}; it must list two texts or more.")
    choices = [choice.strip() for choice in choices]
    if len(set(choices)) < len(choices):
        raise ValueError(f"{place}: two of the choices {choices!r:.80} are the same; remove one.")
    prompt = values.get("prompt")
    if prompt is not None and (not isinstance(prompt, str) or not prompt.strip()):
        raise ValueError(f"{place}: 'prompt' is {prompt!r:.60}; it must be a text, or left out.")
    return ChoiceQuestion(
        question.strip(),
        choices,
        _answer(values.get("answer"), choices, place),
        None if prompt is None else prompt.rstrip(),
    )


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
    choices = list(scores)
    return {
        "question": values.get("input"),
        "choices": choices,
        "answer": choices.index(best[0]),
        "prompt": values.get("prompt"),
    }


def _answer(answer: Any, choices: list[str], place: str) -> int:
    if isinstance(answer, str) and answer.strip() in choices:
        return choices.index(answer.strip())
    if isinstance(answer, int) and not isinstance(answer, bool) and answer in range(len(choices)):
        return answer
    raise ValueError(
        f"{place}: 'answer' is {answer!r:.60}; it must be one of the choices, or its number from 0 "
        f"to {len(choices) - 1}."
    )
