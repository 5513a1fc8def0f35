"""From judgments to a table: means by category and turn, with bootstrap intervals."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from pacatune.evaluation.mt_bench.judging import Judgment
from pacatune.evaluation.mt_bench.questions import TEMPERATURES

__all__ = ["Line", "make_table"]

NUM_RESAMPLES = 10_000
_CONFIDENCE = 0.95


@dataclass(frozen=True, kw_only=True)
class Line:
    """The scores of one category, or of all."""

    name: str
    turn_1: float | None
    """Mean over the judged questions; None if there are none."""
    turn_2: float | None
    mean: float | None
    """Over the judged turns, as in FastChat."""
    low: float | None
    """The interval of `mean`; None with fewer than two questions."""
    high: float | None
    num_questions: int
    num_judged: int
    """Turns."""
    num_failed: int
    """Turns without a score, which no mean counts."""

    def to_dict(self) -> dict[str, Any]:
        """Return it for JSON."""
        return asdict(self)


def make_table(judgments: Sequence[Judgment], seed: int = 0) -> list[Line]:
    """Return a line for each category that was judged, and one of all.

    The interval tells how much the mean would vary with other questions of the kind: they are
    resampled with replacement, both turns of one together. It says nothing about the judge.

    Args:
        judgments: Of `Judge.judge`.
        seed: Of the resampling.
    """
    generator = np.random.default_rng(seed)
    lines = []
    for category in TEMPERATURES:
        own = [one for one in judgments if one.category == category]
        if own:
            lines.append(_line(category, own, generator))
    return [*lines, _line("all", judgments, generator)]


def _line(name: str, judgments: Sequence[Judgment], generator: np.random.Generator) -> Line:
    scores = [one.score for one in judgments if one.score is not None]
    low, high = _interval(judgments, generator)
    return Line(
        name=name,
        turn_1=_mean([one.score for one in judgments if one.turn == 1]),
        turn_2=_mean([one.score for one in judgments if one.turn == 2]),
        mean=_mean(scores),
        low=low,
        high=high,
        num_questions=len({one.question_id for one in judgments}),
        num_judged=len(scores),
        num_failed=len(judgments) - len(scores),
    )


def _mean(scores: Sequence[int | float | None]) -> float | None:
    found = [score for score in scores if score is not None]
    return sum(found) / len(found) if found else None


def _interval(
    judgments: Sequence[Judgment], generator: np.random.Generator
) -> tuple[float | None, float | None]:
    by_question: dict[Any, list[int | float]] = {}
    for one in judgments:
        if one.score is not None:
            by_question.setdefault(one.question_id, []).append(one.score)
    if len(by_question) < 2:
        return None, None
    sums = np.array([sum(scores) for scores in by_question.values()], dtype=np.float64)
    counts = np.array([len(scores) for scores in by_question.values()])
    drawn = generator.integers(len(sums), size=(NUM_RESAMPLES, len(sums)))
    means = sums[drawn].sum(axis=1) / counts[drawn].sum(axis=1)
    tail = (1 - _CONFIDENCE) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    return float(low), float(high)
