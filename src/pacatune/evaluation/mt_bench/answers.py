"""A model's answers in FastChat's `model_answer` form, turn by turn as they come."""

import dataclasses
import hashlib
import json
import signal
import threading
import time
import uuid
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError

from pacatune.adapters.generation import Sampling
from pacatune.data.read import read_rows
from pacatune.evaluation.mt_bench.json_lines import JsonLines
from pacatune.evaluation.mt_bench.questions import (
    NUM_TURNS,
    Question,
    QuestionId,
    answer_turns,
    row_identity,
)

if TYPE_CHECKING:
    from torch import Tensor

    from pacatune.adapters.generation import TextGenerator


__all__ = [
    "AnswerFile",
    "answer_questions",
    "check_template",
    "read_answers",
    "termination_interrupts",
    "turn_seed",
]


# SIGTERM (from a scheduler, say) ends a run as Ctrl-C does: paid replies are kept.


@contextmanager
def termination_interrupts() -> Iterator[None]:
    """Raise KeyboardInterrupt inside this block when SIGTERM arrives; a second one kills."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may set handlers
        return
    before = signal.getsignal(signal.SIGTERM)

    def interrupt(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


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


# Let a model answer the questions, and keep each turn as it comes.


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
    question alone is too long is empty.

    Args:
        generator: The model.
        questions: In any order.
        file: Gets the answers; a row for one question when all are there.
        max_new_tokens: Of each turn.
        batch_size: How many questions are answered at once.
        seed: Of the sampling; each turn of each question has its own, made of this one.
        on_done: Called with how many questions are answered, and of how many.

    Raises:
        KeyboardInterrupt: With what is kept.
        ValueError: If the chat template cannot write a conversation.
    """
    check_template(generator)
    left = [question for question in questions if not file.is_complete(question)]
    on_done(len(questions) - len(left), len(questions))
    sampling = Sampling(max_new_tokens=max_new_tokens, seed=seed)
    try:
        for start in range(0, len(left), batch_size):
            for turn in range(NUM_TURNS):
                batch = left[start : start + batch_size]
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
    """See that a conversation of two turns can be written.

    Raises:
        ValueError: If there is no chat template, or it refuses.
    """
    roles = ("user", "assistant", "user")
    try:
        generator.encode_chat([{"role": role, "content": "Hello"} for role in roles])
    except TemplateError as error:
        raise ValueError(
            f"the chat template of {generator.name!r} cannot write a conversation of two turns "
            f"({error}); give another one: --chat-template FILE."
        ) from error


def turn_seed(seed: int, question: Question, turn: int) -> int:
    """Return the seed of one turn, which no other question changes.

    Args:
        seed: Of the whole run.
        question: Whose answer is sampled.
        turn: 0 or 1.
    """
    return (seed + zlib.crc32(f"{question.id}/{turn}".encode())) % 2**63


def _answer_turn(
    generator: "TextGenerator", questions: Sequence[Question], file: AnswerFile, sampling: Sampling
) -> None:
    whole: list[tuple[Question, Tensor, Sampling]] = []
    for question in questions:
        turn = len(file.turns(question))
        tokens = generator.encode_chat(_conversation(question, file.turns(question)))
        room = _room(generator, tokens, sampling.max_new_tokens)
        own = dataclasses.replace(
            sampling,
            temperature=question.temperature,
            seed=turn_seed(sampling.seed, question, turn),
        )
        if room == sampling.max_new_tokens:
            whole.append((question, tokens, own))
        elif room > 0:
            # Alone: in a batch it would go on beyond its context with the others.
            _answer_batch(
                generator,
                [(question, tokens, dataclasses.replace(own, max_new_tokens=room))],
                file,
                cut_reason="context",
            )
        else:
            details = _details(own, num_prompt_tokens=tokens.shape[1])
            file.add(question, "", details | {"num_tokens": 0, "finish_reason": "no_room"})
    if whole:
        _answer_batch(generator, whole, file, cut_reason="length")


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
        is_cut = answer.finish_reason == "length"
        details = _details(sampling, num_prompt_tokens=tokens.shape[1])
        details |= {
            "num_tokens": answer.num_tokens,
            "finish_reason": cut_reason if is_cut else answer.finish_reason,
        }
        file.add(question, answer.text.strip(), details)


def _conversation(question: Question, answers: Sequence[str]) -> list[dict[str, str]]:
    messages = []
    for turn, text in enumerate(question.turns[: len(answers) + 1]):
        messages.append({"role": "user", "content": text})
        if turn < len(answers):
            messages.append({"role": "assistant", "content": answers[turn]})
    return messages


def _room(generator: "TextGenerator", tokens: "Tensor", wanted: int) -> int:
    context = generator.context_length
    return wanted if context is None else max(0, min(wanted, context - tokens.shape[1]))


def _details(sampling: Sampling, *, num_prompt_tokens: int) -> dict[str, Any]:
    return {
        "temperature": sampling.temperature,
        "seed": sampling.seed,
        "max_new_tokens": sampling.max_new_tokens,
        "num_prompt_tokens": num_prompt_tokens,
    }
