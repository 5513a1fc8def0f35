"""A model's answers in FastChat's `model_answer` form, turn by turn as they come."""

import hashlib
import json
import time
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pacatune.data.read import read_rows
from pacatune.evaluation.mt_bench.json_lines import JsonLines
from pacatune.evaluation.mt_bench.questions import (
    NUM_TURNS,
    Question,
    QuestionId,
    answer_turns,
    row_identity,
)

__all__ = ["AnswerFile", "read_answers"]


class AnswerFile:
    """Answers on disk. The second turn's row repeats the first; the last row of a question counts.

    Args:
        path: File; it may be missing.
        model_id: Name of the model in its rows.

    Attributes:
        notes: What the user should know.

    Raises:
        ValueError: If the file is damaged.
    """

    def __init__(self, path: Path, model_id: str) -> None:
        self.path = path
        self.model_id = model_id
        self._file = JsonLines(path)
        self.notes = list(self._file.notes)
        self._rows: dict[QuestionId, dict[str, Any]] = {}
        for number, row in enumerate(self._file.rows, start=1):
            place = f"{path}, answer {number}"
            answer_turns(row, place)
            self._rows[row_identity(row, place)] = row

    def turns(self, question: Question) -> tuple[str, ...]:
        """Return the turns that are answered.

        Raises:
            ValueError: If they answer another question of that id.
        """
        row = self._rows.get(question.id)
        if row is None:
            return ()
        if row.get("question_sha256") != _hash(question):
            raise ValueError(
                f"{self.path} answers another question {question.id}; the texts of the questions "
                "have changed. Choose another folder: --output DIR."
            )
        return answer_turns(row, str(self.path))

    def is_complete(self, question: Question) -> bool:
        """Whether all turns are answered."""
        return len(self.turns(question)) == NUM_TURNS

    def add(self, question: Question, text: str, details: dict[str, Any]) -> None:
        """Write the next turn of an answer.

        Args:
            question: What it answers.
            text: The answer.
            details: How it came about; kept in the row, as a list with one item for each turn.
        """
        row = self._rows.get(question.id) or {}
        known = row.get("details", {})
        self._rows[question.id] = {
            "question_id": question.id,
            "answer_id": uuid.uuid4().hex[:22],
            "model_id": self.model_id,
            "choices": [{"index": 0, "turns": [*self.turns(question), text]}],
            "tstamp": time.time(),
            "question_sha256": _hash(question),
            "details": {name: [*known.get(name, ()), value] for name, value in details.items()},
        }
        self._file.append(self._rows[question.id])

    def details(self, question: Question) -> dict[str, Any]:
        """Return what `add` was given, by name a list over the turns."""
        details: dict[str, Any] = self._rows[question.id]["details"]
        return details

    def tidy(self) -> None:
        """Leave one row for each question, as the readers of FastChat's files expect."""
        self._file.replace(self._rows.values())


def read_answers(
    path: str, questions: Sequence[Question]
) -> tuple[str | None, dict[QuestionId, tuple[str, ...]]]:
    """Read answers that somebody else made, in FastChat's form.

    Args:
        path: File of one model.
        questions: What must be answered.

    Returns:
        The model's name, if the rows have one, and the turns by question id.

    Raises:
        OSError: If there is no such file.
        ValueError: If a row has another form, the file holds several models, or a question has no
            answer to both turns.
    """
    if not Path(path).expanduser().is_file():
        raise FileNotFoundError(f"--answers ({path!r}) is no file; check the path.")
    answers, models = {}, set()
    for row in read_rows(path):
        answers[row_identity(row.values, row.place)] = answer_turns(row.values, row.place)
        models.add(row.values.get("model_id"))
    if len(models) > 1:
        names = ", ".join(sorted(map(str, models)))
        raise ValueError(f"{path} holds answers of {names}; give a file for each model.")
    missing = [one.id for one in questions if len(answers.get(one.id, ())) != NUM_TURNS]
    if missing:
        shown = ", ".join(map(str, missing[:5])) + ", ..." * (len(missing) > 5)
        raise ValueError(
            f"{path} does not answer both turns of {len(missing)} of {len(questions)} questions: "
            f"{shown}; add the answers, or judge others: --categories, --limit, --questions."
        )
    name = models.pop()
    return (
        name if isinstance(name, str) else None,
        {question.id: answers[question.id] for question in questions},
    )


def _hash(question: Question) -> str:
    return hashlib.sha256(json.dumps(question.turns).encode()).hexdigest()
