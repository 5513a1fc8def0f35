"""Have answers judged, in parallel; every reply is kept as it comes and never asked for again."""

import re
import time
from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import openai
from rich.console import Console
from rich.progress import track

from experiments.mt_bench.config import MtBenchConfig
from experiments.mt_bench.json_lines import JsonLines
from experiments.mt_bench.questions import JUDGE_TEMPERATURE, Turn

_RATING = re.compile(r"\[\[(\d+\.?\d*)\]\]")
_THOUGHT = re.compile(r"^\s*<think>.*?(</think>|\Z)", re.DOTALL)
_BACKUP = re.compile(r"\[(\d+\.?\d*)\]")
_FAILED_SCORE = -1  # FastChat's, which its readers leave out
_REFUSALS = (400, 413, 422)
_USAGE = ("prompt_tokens", "completion_tokens")


def parse_rating(text: str) -> int | float | None:
    """Return the rating in a judgment, or None if there is none from 1 to 10.

    The first `[[x]]` counts, as in FastChat, or else the first `[x]`. What a model thinks before
    it judges does not count.
    """
    text = _THOUGHT.sub("", text)
    match = _RATING.search(text) or _BACKUP.search(text)
    rating = float(match.group(1)) if match else 0.0
    if not 1 <= rating <= 10:
        return None
    return int(rating) if rating.is_integer() else rating


class Judge:
    """Rates answers by an OpenAI-compatible endpoint, and remembers what was ever replied.

    `path` is a `model_judgment` file in FastChat's form. A reply without a rating is a row of its
    own, with score -1; after `judge_attempts` of them the turn has failed. The key is in a header
    of the requests and nowhere else: not in a message, not in the file.
    """

    def __init__(self, config: MtBenchConfig, path: Path) -> None:
        self._config, self._key = config, config.judge_key()
        self._client = openai.OpenAI(
            base_url=config.judge_url,
            # Without one, openai takes that of OPENAI_API_KEY.
            api_key=self._key or "no-key",
            timeout=config.judge_timeout_s,
            max_retries=config.judge_retries,
        )
        self._settings: dict[str, Any] = {
            "temperature": JUDGE_TEMPERATURE,
            "max_tokens": config.judge_max_tokens,
        }
        self._file = JsonLines(path)
        self._rows: dict[str, list[dict[str, Any]]] = {}
        self._refused: dict[str, str] = {}
        for row in self._file.rows:
            if "key" in row:  # else another program's
                self._rows.setdefault(row["key"], []).append(row)

    def judge(self, turns: Sequence[Turn], log: Console) -> list[dict[str, Any]]:
        """Judge turns of answers; return what became of each, in order."""
        pending = {turn.key: turn for turn in turns if not self._is_settled(turn.key)}
        with ThreadPoolExecutor(self._config.judge_parallel) as pool:
            futures = [pool.submit(self._settle, turn) for turn in pending.values()]
            try:
                done = as_completed(futures)
                for future in track(done, "judging", total=len(futures), console=log):
                    future.result()
            except BaseException:
                # What is under way has been paid for: it is waited for and kept.
                pool.shutdown(cancel_futures=True)
                kept = sum(map(len, self._rows.values()))
                log.print(f"{kept} replies are kept; the same command goes on from there.")
                raise
        return [self._judgment(turn) for turn in turns]

    def used(self, keys: Collection[str]) -> dict[str, Any]:
        """Return what judgments took: models that answered, temperatures, replies and tokens."""
        rows = [row for key in keys for row in self._rows.get(key, [])]
        return {
            "models": sorted({row["judge_reported"] for row in rows}),
            "temperatures": sorted({str(row["temperature"]) for row in rows}),
            **{name: sum(row["usage"].get(name, 0) for row in rows) for name in _USAGE},
        }

    def _settle(self, turn: Turn) -> None:
        """Ask until there is a rating or the attempts are used up."""
        while not self._is_settled(turn.key) and turn.key not in self._refused:
            try:
                row = self._ask(turn)
            except openai.OpenAIError as error:
                if getattr(error, "status_code", None) not in _REFUSALS:
                    raise self._unavailable(error) from None
                self._refused[turn.key] = f"the judge refuses the prompt: {self._clean(error)}"
            else:
                self._file.append(row)
                self._rows.setdefault(turn.key, []).append(row)

    def _ask(self, turn: Turn) -> dict[str, Any]:
        """Return a row of the file with the judge's reply about one turn."""
        settings = self._settings
        try:
            reply = self._client.chat.completions.create(
                model=self._config.judge_model,
                messages=[
                    {"role": "system", "content": turn.system},
                    {"role": "user", "content": turn.user},
                ],
                **settings,
            )
        except openai.BadRequestError as error:
            accepted = _without_disputed(settings, error.message)
            if accepted == settings:
                raise
            self._settings = accepted
            return self._ask(turn)  # at most twice: each time one field less is disputed
        if not getattr(reply, "choices", None):
            raise openai.OpenAIError(f"something else than an OpenAI-compatible reply: {reply!r}")
        text = self._without_key(reply.choices[0].message.content)
        return {
            "question_id": turn.question.id,
            "model": self._config.model_id,
            "judge": [self._config.judge_model, turn.prompt_name],
            "user_prompt": turn.user,
            "judgment": text,
            "score": parse_rating(text) or _FAILED_SCORE,
            "turn": turn.number,
            "tstamp": time.time(),
            "key": turn.key,
            "judge_reported": self._without_key(reply.model),
            "temperature": settings.get("temperature"),
            "max_tokens": self._config.judge_max_tokens,
            "finish_reason": reply.choices[0].finish_reason,
            "usage": {name: getattr(reply.usage, name, None) or 0 for name in _USAGE},
        }

    def _unavailable(self, error: openai.OpenAIError) -> OSError:
        where = f"the judge at {self._config.judge_url}"
        if isinstance(error, openai.AuthenticationError | openai.PermissionDeniedError):
            # Endpoints repeat parts of a key that they do not know: none of their text is shown.
            return OSError(f"{where} refuses the key; name its variable: --judge-key-env NAME.")
        return OSError(
            f"{where} gives no answer ({self._clean(error)}); check --judge-url (it usually ends "
            f"in /v1) and --judge-model ({self._config.judge_model!r}), and go on later."
        )

    def _rating(self, key: str) -> int | float | None:
        ratings = (parse_rating(row["judgment"]) for row in self._rows.get(key, []))
        return next((rating for rating in ratings if rating is not None), None)

    def _is_settled(self, key: str) -> bool:
        # A reply that was cut off at fewer tokens than are allowed now does not count.
        limit = self._config.judge_max_tokens
        replies = [
            row
            for row in self._rows.get(key, [])
            if row["finish_reason"] != "length" or row["max_tokens"] >= limit
        ]
        return len(replies) >= self._config.judge_attempts or self._rating(key) is not None

    def _judgment(self, turn: Turn) -> dict[str, Any]:
        score, problem = self._rating(turn.key), self._refused.get(turn.key)
        if score is None and problem is None:
            last = self._rows[turn.key][-1]
            text = " ".join(last["judgment"].split())[-80:]
            problem = f"no rating from 1 to 10; the last reply: ...{text!r}"
            if last["finish_reason"] == "length":
                problem += " was cut off; raise --judge-max-tokens"
        return {
            "question_id": turn.question.id,
            "category": turn.question.category,
            "turn": turn.number,
            "score": score,
            "problem": problem,
        }

    def _without_key(self, text: str | None) -> str:
        text = text or ""
        return text.replace(self._key, "***") if self._key else text

    def _clean(self, error: openai.OpenAIError) -> str:
        cause = f": {error.__cause__}" if error.__cause__ else ""
        return " ".join(self._without_key(f"{error}{cause}").split())[:300]


def _without_disputed(settings: dict[str, Any], refusal: str) -> dict[str, Any]:
    """Return the settings of requests after a refusal; the same where it is about none of them.

    OpenAI's reasoning models call `max_tokens` otherwise, and choose their temperature themselves.
    They say so when they refuse a request, which costs nothing.
    """
    left = dict(settings)
    if "support" in refusal.lower():
        if "max_tokens" in left and "max_completion_tokens" in refusal:
            left["max_completion_tokens"] = left.pop("max_tokens")
        elif "temperature" in refusal:
            left.pop("temperature", None)
    return left
