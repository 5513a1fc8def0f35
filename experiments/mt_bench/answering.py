"""A model's answers, made by it turn by turn and kept as they come."""

import time
import uuid
import zlib
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track

from experiments.mt_bench.config import MtBenchConfig
from experiments.mt_bench.json_lines import JsonLines
from experiments.mt_bench.questions import NUM_TURNS, TEMPERATURES, Question
from pacatune.adapters.generation import Generated, TextGenerator
from pacatune.adapters.sampling import Sampling


class AnswerFile(JsonLines):
    """Answers on disk in FastChat's `model_answer` form.

    The second turn's row repeats the first; the last row of a question counts, as in FastChat.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._last = {row["question_id"]: row for row in self.rows}

    def turns(self, question: Question) -> list[str]:
        """Return the turns that are answered."""
        return self._last[question.id]["choices"][0]["turns"] if question.id in self._last else []

    def details(self, question: Question, name: str) -> list[Any]:
        """Return a detail that `add` was given, of each turn."""
        found: list[Any] = self._last.get(question.id, {}).get("details", {}).get(name, [])
        return found

    def add(self, question: Question, text: str, details: dict[str, Any]) -> None:
        """Write the next turn of an answer, and how it came about."""
        self._last[question.id] = {
            "question_id": question.id,
            "answer_id": uuid.uuid4().hex[:22],
            "model_id": self.path.stem,
            "choices": [{"index": 0, "turns": [*self.turns(question), text]}],
            "tstamp": time.time(),
            "details": {
                name: [*self.details(question, name), value] for name, value in details.items()
            },
        }
        self.append(self._last[question.id])


def answer_questions(
    config: MtBenchConfig, questions: Sequence[Question], file: AnswerFile, log: Console
) -> None:
    """Answer what the file does not answer yet.

    An answer for which the model's context has too little room is cut off there; one whose
    question alone is too long is empty.
    """
    left = [question for question in questions if len(file.turns(question)) < NUM_TURNS]
    if not left:
        return
    template = config.chat_template.read_text(encoding="utf-8") if config.chat_template else None
    generator = TextGenerator(
        config.model,
        config.adapter,
        dtype=config.dtype,
        device=config.device,
        allow_other_base=config.allow_other_base,
        quantization=config.quantization,
        chat_template=template,
    )
    for note in generator.notes:
        log.print(f"note: {note}")
    starts = range(0, len(left), config.batch_size)
    for start in track(starts, "answering", console=log):
        batch = left[start : start + config.batch_size]
        for turn in range(NUM_TURNS):
            todo = [question for question in batch if len(file.turns(question)) == turn]
            _answer_turn(generator, todo, file, config)


def turn_seed(seed: int, question: Question, turn: int) -> int:
    """Return the seed of one turn (0 or 1), which no other question changes."""
    return (seed + zlib.crc32(f"{question.id}/{turn}".encode())) % 2**63


def _answer_turn(
    generator: TextGenerator, questions: Sequence[Question], file: AnswerFile, config: MtBenchConfig
) -> None:
    by_room = defaultdict(list)  # in a batch all go on as long as the longest
    for question in questions:
        tokens = generator.encode_chat(_conversation(question, file.turns(question)))
        room = config.max_new_tokens
        if generator.context_length is not None:
            room = max(0, min(room, generator.context_length - tokens.shape[1]))
        by_room[room].append((question, tokens))
    for room, batch in by_room.items():
        samplings = [
            Sampling(
                max_new_tokens=max(room, 1),
                temperature=TEMPERATURES[question.category],
                seed=turn_seed(config.seed, question, len(file.turns(question))),
            )
            for question, _ in batch
        ]
        answers = [Generated(text="", num_tokens=0, finish_reason="length")] * len(batch)
        if room:
            answers = generator.generate_batch([tokens for _, tokens in batch], samplings)
        for (question, _), sampling, answer in zip(batch, samplings, answers, strict=True):
            reason: str = answer.finish_reason
            if reason == "length" and room < config.max_new_tokens:
                reason = "context" if room else "no_room"
            details = {
                "temperature": sampling.temperature,
                "seed": sampling.seed,
                "num_tokens": answer.num_tokens,
                "finish_reason": reason,
            }
            file.add(question, answer.text.strip(), details)


def _conversation(question: Question, answers: Sequence[str]) -> list[dict[str, str]]:
    messages = []
    for text, answer in zip(question.turns, answers, strict=False):
        messages.append({"role": "user", "content": text})
        messages.append({"role": "assistant", "content": answer})
    return [*messages, {"role": "user", "content": question.turns[len(answers)]}]
