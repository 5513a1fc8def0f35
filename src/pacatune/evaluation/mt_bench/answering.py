"""Let a model answer the questions, and keep each turn as it comes."""

import dataclasses
import zlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError

from pacatune.adapters.generation import Sampling
from pacatune.evaluation.mt_bench.answers import AnswerFile
from pacatune.evaluation.mt_bench.questions import NUM_TURNS, Question

if TYPE_CHECKING:
    from torch import Tensor

    from pacatune.adapters.generation import TextGenerator

__all__ = ["answer_questions", "check_template", "turn_seed"]


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
        max_new_tokens: Most tokens of each turn.
        batch_size: How many questions are answered at once.
        seed: Seed of the sampling; each turn of each question has its own, made of this one.
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
        seed: Seed of the whole run.
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
