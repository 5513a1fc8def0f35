"""lm-eval on a model in memory: what every evaluation that it scores has in common."""

import contextlib
import logging
import math
from collections.abc import Iterator, Sequence
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


def run_tasks(
    model: Any,
    tokenizer: Any,
    tasks: Sequence[Any],
    *,
    limit: int | None = None,
    num_fewshot: int | None = None,
    batch_size: int = 8,
    chat: bool = False,
    seed: int = 0,
    progress: bool = False,
    keep_line_break: bool = False,
) -> TaskScores:
    """Score a model by lm-eval on its tasks, groups, or configurations of tasks.

    For the other arguments see `evaluate_tasks` and `LanguageModel`.
    """
    for name, value, least in (("limit", limit, 1), ("num_fewshot", num_fewshot, 0)):
        if value is not None and value < least:
            raise ValueError(f"`{name}` ({value}) must be at least {least}, or left out.")
    if chat and not tokenizer.chat_template:
        raise ValueError(
            "`chat` needs a chat template, which the model's tokenizer lacks; leave it out, or "
            "take an instruction-tuned model."
        )
    import lm_eval
    from lm_eval.tasks import TaskManager

    from pacatune.evaluation.language_model import LanguageModel

    lm = LanguageModel(
        model, tokenizer, batch_size=batch_size, progress=progress, keep_line_break=keep_line_break
    )
    try:
        with quiet_lm_eval():
            result = lm_eval.simple_evaluate(
                model=lm,
                tasks=list(tasks),
                task_manager=TaskManager(include_defaults=False),
                limit=limit,
                num_fewshot=num_fewshot,
                apply_chat_template=chat,
                fewshot_as_multiturn=chat,
                bootstrap_iters=1000,
                # None: it would seed the global generators.
                random_seed=None,
                numpy_random_seed=None,
                torch_random_seed=None,
                fewshot_random_seed=seed,
            )
    except AssertionError as error:
        if "fewshot samples" not in str(error):
            raise
        raise ValueError(f"`num_fewshot` ({num_fewshot}) is too many: {error} Lower it.") from error
    return _to_scores(result, lm.num_truncated)


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


def _to_scores(result: dict[str, Any], num_truncated: int) -> TaskScores:
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
