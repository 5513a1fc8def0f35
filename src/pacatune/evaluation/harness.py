"""What lm-eval says, without its log lines and bars."""

import contextlib
import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

from pacatune.installation import require_extra


@dataclass(frozen=True, kw_only=True)
class Score:
    """One number, with what it takes to judge it."""

    value: float
    stderr: float | None
    """Standard error of the mean over questions; None where one question cannot give it."""
    num_questions: int


@dataclass(frozen=True, kw_only=True)
class TaskScores:
    """What lm-eval says about tasks."""

    tasks: dict[str, dict[str, Score]]
    """Task or group -> metric -> score, groups first."""
    groups: dict[str, list[str]]
    """Group -> the tasks and groups in it."""
    num_fewshot: dict[str, int]
    questions: list[dict[str, Any]] = field(repr=False)
    """For each question: task, number in the data, answer, log-likelihoods or text, and metrics."""
    num_truncated: int
    """Prompts that were longer than the model's context, cut at their start."""
    versions: dict[str, Any]
    """Versions of the tasks, as lm-eval counts them."""


def require_lm_eval() -> None:
    """Refuse to go on without lm-eval."""
    require_extra("this evaluation", "eval", ("lm_eval",))


@contextlib.contextmanager
def quiet_lm_eval() -> Iterator[None]:
    """Keep lm-eval's log lines to itself, the bars per task, of which MMLU has 57, and git's words.

    It also lists every package and device of the machine, in seconds; our results name the
    versions that decide them.
    """
    import datasets
    import lm_eval.api.task
    import lm_eval.evaluator

    logger = logging.getLogger("lm_eval")
    level, had_bars = logger.level, not datasets.are_progress_bars_disabled()
    logger.setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    try:
        with (
            patch.object(lm_eval.api.task, "tqdm", lambda items, **_: items),
            patch.multiple(
                lm_eval.evaluator,
                add_env_info=lambda results: None,
                get_git_commit_hash=lambda: None,
            ),
        ):
            yield
    finally:
        logger.setLevel(level)
        if had_bars:
            datasets.enable_progress_bars()


def to_scores(result: dict[str, Any], num_truncated: int) -> TaskScores:
    """Return what lm-eval's `simple_evaluate` returned, and how many prompts were cut."""
    counts = {name: each["effective"] for name, each in result["n-samples"].items()}
    groups = {name: list(found) for name, found in result["group_subtasks"].items() if found}

    def num_questions(name: str) -> int:
        return counts.get(name) or sum(map(num_questions, groups[name]))

    found = result.get("groups", {}) | result["results"]
    return TaskScores(
        tasks={name: _metrics(metrics, num_questions(name)) for name, metrics in found.items()},
        groups=groups,
        num_fewshot=dict(result["n-shot"]),
        questions=[
            _question(task, sample)
            for task, samples in result["samples"].items()
            for sample in samples
        ],
        num_truncated=num_truncated,
        versions=dict(result["versions"]),
    )


def _metrics(metrics: dict[str, Any], num_questions: int) -> dict[str, Score]:
    scores = {}
    for key, value in metrics.items():
        name, _, filter_name = key.partition(",")
        if not filter_name or name.endswith("_stderr") or not isinstance(value, int | float):
            continue
        stderr = metrics.get(f"{name}_stderr,{filter_name}")
        if not isinstance(stderr, int | float) or not math.isfinite(stderr) or num_questions < 2:
            stderr = None
        shown = name if filter_name == "none" else f"{name} ({filter_name})"
        scores[shown] = Score(value=float(value), stderr=stderr, num_questions=num_questions)
    return scores


def _question(task: str, sample: dict[str, Any]) -> dict[str, Any]:
    """Return what is kept of a question: enough to compare two models, without its text."""
    return {
        "task": task,
        "number": sample["doc_id"],
        "filter": sample["filter"],
        "answer": sample["target"],
        "responses": [
            response[0] if isinstance(response, list | tuple) else response
            for response in sample["filtered_resps"]
        ],
        **{metric: sample[metric] for metric in sample["metrics"]},
    }
