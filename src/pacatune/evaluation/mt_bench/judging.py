"""Have answers judged, in parallel; every reply is kept as it comes and never asked for again."""

import hashlib
import json
import re
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pacatune.evaluation.mt_bench.client import (
    TEMPERATURE,
    JudgeClient,
    JudgeStopped,
    JudgeUnavailable,
    Reply,
    RequestRefused,
)
from pacatune.evaluation.mt_bench.questions import (
    NUM_TURNS,
    Prompt,
    Question,
    QuestionId,
    render,
)
from pacatune.files.json_lines import JsonLines

LOWEST, HIGHEST = 1, 10
_RATING = re.compile(r"\[\[(\d+\.?\d*)\]\]")
_THOUGHT = re.compile(r"^\s*<think>.*?(</think>|\Z)", re.DOTALL)
_BACKUP = re.compile(r"\[(\d+\.?\d*)\]")
_FAILED_SCORE = -1  # FastChat's, which its readers leave out
_MAX_REFUSALS = 5


def parse_rating(text: str) -> int | float | None:
    """Return the rating in a judgment, or None if there is none from 1 to 10.

    The first `[[x]]` counts, as in FastChat, or else the first `[x]`. What a model thinks before
    it judges does not count.
    """
    text = _THOUGHT.sub("", text)
    match = _RATING.search(text) or _BACKUP.search(text)
    if match is None:
        return None
    rating = float(match.group(1))
    if not LOWEST <= rating <= HIGHEST:
        return None
    return int(rating) if rating.is_integer() else rating


@dataclass(frozen=True, kw_only=True)
class Judgment:
    """What became of one turn of one answer."""

    key: str
    """Hash of judge, prompt and answer."""
    question_id: QuestionId
    category: str
    turn: int
    score: int | float | None
    problem: str | None = None
    """Why there is no score."""


@dataclass(frozen=True, kw_only=True)
class _Task:
    question: Question
    turn: int
    prompt: Prompt
    key: str


class Judge:
    """Rates answers by a client, and remembers what was ever replied.

    `path` is a `model_judgment` file in FastChat's form. A reply without a rating is a row of its
    own, with score -1; after `max_attempts` of them the turn has failed.
    """

    def __init__(
        self,
        client: JudgeClient,
        prompts: Mapping[str, Prompt],
        path: Path,
        *,
        model_id: str,
        max_attempts: int = 3,
        parallel: int = 4,
        say: Callable[[str], None] = lambda line: None,
    ) -> None:
        self._client, self._prompts, self._model_id = client, prompts, model_id
        self._max_attempts, self._parallel, self._say = max_attempts, parallel, say
        self._file = JsonLines(path)
        self.notes: list[str] = []
        self._rows: dict[str, list[dict[str, Any]]] = {}
        self._refused: dict[str, str] = {}
        foreign = 0
        for row in self._file.rows:
            if isinstance(row.get("key"), str) and isinstance(row.get("judgment"), str):
                self._rows.setdefault(row["key"], []).append(row)
            else:
                foreign += 1
        if foreign:
            self.notes.append(f"{path}: {foreign} judgments are not pacatune's and do not count.")

    def judge(
        self,
        questions: Sequence[Question],
        answers: Mapping[QuestionId, Sequence[str]],
        on_done: Callable[[int, int], None] = lambda done, total: None,
    ) -> list[Judgment]:
        """Judge both turns of every answer, in order; `on_done` is told how many of how many."""
        tasks = [
            self._task(question, answers[question.id], turn)
            for question in questions
            for turn in range(1, NUM_TURNS + 1)
        ]
        pending = {task.key: task for task in tasks if not self._is_settled(task.key)}
        on_done(len(tasks) - len(pending), len(tasks))
        if pending:
            self._work(list(pending.values()), len(tasks), on_done)
        return [self._judgment(task) for task in tasks]

    def used(self, keys: Collection[str]) -> dict[str, Any]:
        """Return what judgments took: the models, their temperatures, replies and tokens."""
        rows = [row for key in keys for row in self._rows.get(key, [])]
        models = sorted({row["judge_reported"] for row in rows if row.get("judge_reported")})
        temperatures = {row.get("temperature", TEMPERATURE) for row in rows}
        usage = [row.get("usage") or {} for row in rows]
        names = ("prompt_tokens", "completion_tokens")
        return {
            "models": models,
            "temperatures": sorted(temperatures, key=lambda one: -1 if one is None else one),
            "num_replies": len(rows),
            **{name: sum(one.get(name, 0) for one in usage) for name in names},
        }

    def _work(self, tasks: list[_Task], num_all: int, on_done: Callable[[int, int], None]) -> None:
        num_done = num_all - len(tasks)
        with ThreadPoolExecutor(self._parallel, thread_name_prefix="judge") as pool:
            futures = [pool.submit(self._ask, task) for task in tasks]
            try:
                for future in as_completed(futures):
                    if future.result():
                        num_done += 1
                        on_done(num_done, num_all)
            except BaseException as error:
                # What is under way has been paid for: wait for it and keep it.
                self._client.stop.set()
                self._say("stopping; the replies to requests under way are waited for and kept")
                pool.shutdown(cancel_futures=True)
                if not isinstance(error, KeyboardInterrupt | JudgeUnavailable):
                    raise
                raise self._explained(error, num_all) from error

    def _explained(self, error: BaseException, num_all: int) -> BaseException:
        kept = (
            f"{sum(map(len, self._rows.values()))} replies are kept in {self._file.path} (of "
            f"{num_all} turns to judge); run the same command again to go on from there."
        )
        if isinstance(error, KeyboardInterrupt):
            return KeyboardInterrupt(f"interrupted; {kept}")
        return JudgeUnavailable(f"{error}. {kept}")

    def _ask(self, task: _Task) -> bool:
        """Ask until there is a rating or the attempts are used up; False if all work stops."""
        try:
            while not self._is_settled(task.key) and task.key not in self._refused:
                self._ask_once(task)
        except JudgeStopped:
            return False
        except BaseException:
            self._client.stop.set()  # at once: the next task is already waiting for this thread
            raise
        return True

    def _ask_once(self, task: _Task) -> None:
        try:
            reply = self._client.ask(task.prompt)
        except RequestRefused as refusal:
            self._refused[task.key] = f"the judge refuses the prompt: {refusal}"
            if len(self._refused) >= _MAX_REFUSALS and not self._rows:
                raise ValueError(
                    f"the judge has refused all of {len(self._refused)} requests ({refusal}); "
                    "check --judge-model and --judge-url."
                ) from None
            return
        row = self._row(task, reply)
        self._file.append(row)
        self._rows.setdefault(task.key, []).append(row)

    def _task(self, question: Question, answers: Sequence[str], turn: int) -> _Task:
        prompt = render(self._prompts, question, answers, turn)
        # The answer is part of the prompt.
        asked = [self._client.model, TEMPERATURE, prompt.system, prompt.user]
        key = hashlib.sha256(json.dumps(asked).encode()).hexdigest()
        return _Task(question=question, turn=turn, prompt=prompt, key=key)

    def _row(self, task: _Task, reply: Reply) -> dict[str, Any]:
        rating = parse_rating(reply.text)
        return {
            "question_id": task.question.id,
            "model": self._model_id,
            "judge": [self._client.model, task.prompt.name],
            "user_prompt": task.prompt.user,
            "judgment": reply.text,
            "score": _FAILED_SCORE if rating is None else rating,
            "turn": task.turn,
            "tstamp": time.time(),
            "key": task.key,
            "judge_reported": reply.model,
            "temperature": reply.temperature,
            "max_tokens": self._client.max_tokens,
            "finish_reason": reply.finish_reason,
            "usage": reply.usage,
        }

    def _rating(self, key: str) -> int | float | None:
        ratings = (parse_rating(row["judgment"]) for row in self._rows.get(key, []))
        return next((rating for rating in ratings if rating is not None), None)

    def _is_settled(self, key: str) -> bool:
        replies = [row for row in self._rows.get(key, []) if not self._may_go_on(row)]
        return len(replies) >= self._max_attempts or self._rating(key) is not None

    def _may_go_on(self, row: dict[str, Any]) -> bool:
        """Whether a reply was cut off at fewer tokens than are allowed now."""
        limit = row.get("max_tokens", self._client.max_tokens)
        return row.get("finish_reason") == "length" and limit < self._client.max_tokens

    def _judgment(self, task: _Task) -> Judgment:
        score, problem = self._rating(task.key), None
        if score is None:
            problem = self._refused.get(task.key) or self._no_rating(self._rows[task.key])
        return Judgment(
            key=task.key,
            question_id=task.question.id,
            category=task.question.category,
            turn=task.turn,
            score=score,
            problem=problem,
        )

    def _no_rating(self, replies: list[dict[str, Any]]) -> str:
        last = " ".join(replies[-1]["judgment"].split())[-80:]
        problem = f"no rating from 1 to 10 in {len(replies)} replies; the last: ...{last!r}"
        if replies[-1].get("finish_reason") == "length":
            limit = self._client.max_tokens
            problem += f" was cut off at {limit} tokens; raise --judge-max-tokens"
        return problem
