"""A model's answers: made by it turn by turn and kept as they come, or read from others."""

import dataclasses
import hashlib
import json
import time
import uuid
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError

from pacatune.adapters.sampling import Sampling
from pacatune.data.read import read_rows
from pacatune.evaluation.mt_bench.questions import (
    NUM_TURNS,
    Question,
    QuestionId,
    answer_turns,
    row_identity,
)
from pacatune.files.json_lines import JsonLines

if TYPE_CHECKING:
    from torch import Tensor

    from pacatune.adapters.generation import TextGenerator


class AnswerFile:
    """Answers on disk in FastChat's `model_answer` form.

    The second turn's row repeats the first; the last row of a question counts.
    """

    def __init__(self, path: Path, model_id: str) -> None:
        self.path = path
        self.model_id = model_id
        self._file = JsonLines(path)
        self._rows: dict[QuestionId, dict[str, Any]] = {}
        for number, row in enumerate(self._file.rows, start=1):
            place = f"{path}, answer {number}"
            answer_turns(row, place)
            self._rows[row_identity(row, place)] = row

    def turns(self, question: Question) -> tuple[str, ...]:
        """Return the turns that are answered."""
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
        """Write the next turn of an answer, and how it came about."""
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

    def details(self, question: Question) -> dict[str, list[Any]]:
        """Return what `add` was given, by name a list over the turns."""
        details: dict[str, list[Any]] = self._rows[question.id]["details"]
        return details

    def tidy(self) -> None:
        """Leave one row for each question, as the readers of FastChat's files expect."""
        self._file.replace(self._rows.values())


def _hash(question: Question) -> str:
    return hashlib.sha256(json.dumps(question.turns).encode()).hexdigest()


def read_answers(
    path: str, questions: Sequence[Question]
) -> tuple[str | None, dict[QuestionId, tuple[str, ...]]]:
    """Read one model's answers in FastChat's form: its name, if rows have one, and the turns."""
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
    return name if isinstance(name, str) else None, {one.id: answers[one.id] for one in questions}


def answer_questions(
    generator: "TextGenerator",
    questions: Sequence[Question],
    file: AnswerFile,
    *,
    max_new_tokens: int,
    batch_size: int,
    seed: int,
    on_done: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Answer what the file does not answer yet.

    An answer for which the model's context has too little room is cut off there; one whose
    question alone is too long is empty. `on_done` is told how many are answered, and of how many.
    """
    check_template(generator)
    left = [question for question in questions if not file.is_complete(question)]
    on_done(len(questions) - len(left), len(questions))
    sampling = Sampling(max_new_tokens=max_new_tokens, seed=seed)
    try:
        for start in range(0, len(left), batch_size):
            batch = left[start : start + batch_size]
            for turn in range(NUM_TURNS):
                todo = [question for question in batch if len(file.turns(question)) == turn]
                _answer_turn(generator, todo, file, sampling)
            on_done(len(questions) - len(left[start + batch_size :]), len(questions))
    except KeyboardInterrupt:
        num_kept = sum(map(file.is_complete, questions))
        raise KeyboardInterrupt(
            f"interrupted; {num_kept} of {len(questions)} answers are kept in {file.path}; run the "
            "same command again to go on from there."
        ) from None
    file.tidy()


def check_template(generator: "TextGenerator") -> None:
    """See that the model's chat template can write a conversation of two turns."""
    roles = ("user", "assistant", "user")
    try:
        generator.encode_chat([{"role": role, "content": "Hello"} for role in roles])
    except TemplateError as error:
        raise ValueError(
            f"the chat template of {generator.name!r} cannot write a conversation of two turns "
            f"({error}); give another one: --chat-template FILE."
        ) from error


def turn_seed(seed: int, question: Question, turn: int) -> int:
    """Return the seed of one turn (0 or 1), which no other question changes."""
    return (seed + zlib.crc32(f"{question.id}/{turn}".encode())) % 2**63


def _answer_turn(
    generator: "TextGenerator",
    questions: Sequence[Question],
    file: AnswerFile,
    sampling: Sampling,
) -> None:
    whole: list[tuple[Question, Tensor, Sampling]] = []
    for question in questions:
        answers = file.turns(question)
        tokens = generator.encode_chat(_conversation(question, answers))
        room = sampling.max_new_tokens
        if generator.context_length is not None:
            room = max(0, min(room, generator.context_length - tokens.shape[1]))
        own = dataclasses.replace(
            sampling,
            temperature=question.temperature,
            seed=turn_seed(sampling.seed, question, len(answers)),
        )
        if room == sampling.max_new_tokens:
            whole.append((question, tokens, own))
        elif room > 0:
            # Alone: in a batch it would go on beyond its context with the others.
            cut = dataclasses.replace(own, max_new_tokens=room)
            _answer_batch(generator, [(question, tokens, cut)], file, cut_reason="context")
        else:
            file.add(question, "", _details(own, tokens, 0, "no_room"))
    if whole:
        _answer_batch(generator, whole, file, cut_reason="length")


def _conversation(question: Question, answers: Sequence[str]) -> list[dict[str, str]]:
    messages = []
    for text, answer in zip(question.turns, answers, strict=False):
        messages.append({"role": "user", "content": text})
        messages.append({"role": "assistant", "content": answer})
    return [*messages, {"role": "user", "content": question.turns[len(answers)]}]


def _answer_batch(
    generator: "TextGenerator",
    batch: "Sequence[tuple[Question, Tensor, Sampling]]",
    file: AnswerFile,
    *,
    cut_reason: str,
) -> None:
    samplings = [sampling for _, _, sampling in batch]
    answers = generator.generate_batch([tokens for _, tokens, _ in batch], samplings)
    for (question, tokens, sampling), answer in zip(batch, answers, strict=True):
        reason = cut_reason if answer.finish_reason == "length" else answer.finish_reason
        details = _details(sampling, tokens, answer.num_tokens, reason)
        file.add(question, answer.text.strip(), details)


def _details(
    sampling: Sampling, tokens: "Tensor", num_tokens: int, finish_reason: str
) -> dict[str, Any]:
    return {
        "temperature": sampling.temperature,
        "seed": sampling.seed,
        "max_new_tokens": sampling.max_new_tokens,
        "num_prompt_tokens": tokens.shape[1],
        "num_tokens": num_tokens,
        "finish_reason": finish_reason,
    }
