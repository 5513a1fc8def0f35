"""lm-eval on a model in memory: what every evaluation that it scores has in common."""

import contextlib
import logging
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from pacatune.installation import require_extra

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager


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
    """Task or group -> metric -> score."""
    num_fewshot: dict[str, int]
    questions: list[dict[str, Any]] = field(repr=False)
    """For each question: task, number in the data, answer, log-likelihoods or text, and metrics."""
    num_truncated: int
    """Prompts that were longer than the model's context, cut at their start."""
    versions: dict[str, Any]
    """Versions of the tasks, as lm-eval counts them."""


@dataclass(frozen=True)
class PreparedTasks:
    """Tasks whose data is loaded."""

    manager: "TaskManager"
    tasks: list[Any]
    """What lm-eval takes: tasks and groups, or configurations."""


def require_lm_eval() -> None:
    """Refuse to go on without lm-eval."""
    require_extra("this evaluation", "eval", ("lm_eval",))


def run_tasks(
    model: Any,
    tokenizer: Any,
    tasks: PreparedTasks,
    *,
    limit: int | None = None,
    num_fewshot: int | None = None,
    batch_size: int = 8,
    chat: bool = False,
    seed: int = 0,
    progress: bool = False,
    keep_line_break: bool = False,
) -> TaskScores:
    """Score a model by lm-eval; for the arguments see `evaluate_tasks` and `LanguageModel`."""
    for name, value, least in (("limit", limit, 1), ("num_fewshot", num_fewshot, 0)):
        if value is not None and value < least:
            raise ValueError(f"`{name}` ({value}) must be at least {least}, or left out.")
    if chat and not tokenizer.chat_template:
        raise ValueError(
            "`chat` needs a chat template, which the model's tokenizer lacks; leave it out, or "
            "take an instruction-tuned model."
        )
    import lm_eval

    from pacatune.evaluation.language_model import LanguageModel

    lm = LanguageModel(
        model, tokenizer, batch_size=batch_size, progress=progress, keep_line_break=keep_line_break
    )
    with quiet_lm_eval(), _own_randomness(lm.device):
        result = lm_eval.simple_evaluate(
            model=lm,
            tasks=tasks.tasks,
            task_manager=tasks.manager,
            limit=limit,
            num_fewshot=num_fewshot,
            apply_chat_template=chat,
            fewshot_as_multiturn=chat,
            bootstrap_iters=1000,
            random_seed=seed,
            numpy_random_seed=seed,
            torch_random_seed=seed,
            fewshot_random_seed=seed,
        )
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
            _replaced(lm_eval.api.task, "tqdm", lambda items, **_: items),
            _replaced(lm_eval.evaluator, "add_env_info", lambda results: None),
            _replaced(lm_eval.evaluator, "get_git_commit_hash", lambda: None),
        ):
            yield
    finally:
        logger.setLevel(level)
        if had_bars:
            datasets.enable_progress_bars()


@contextlib.contextmanager
def _own_randomness(device: torch.device) -> Iterator[None]:
    """Leave the global random states as they are, which lm-eval sets."""
    state, numpy_state = random.getstate(), np.random.get_state()  # noqa: NPY002  # lm-eval's
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            yield
    finally:
        random.setstate(state)
        np.random.set_state(numpy_state)  # noqa: NPY002  # lm-eval's


@contextlib.contextmanager
def _replaced(module: Any, name: str, value: Any) -> Iterator[None]:
    if not hasattr(module, name):  # in another release: nothing to keep quiet
        yield
        return
    original = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, original)


def _to_scores(result: dict[str, Any], num_truncated: int) -> TaskScores:
    counts = {name: each["effective"] for name, each in result["n-samples"].items()}
    scores = {}
    for name, metrics in {**result["results"], **result.get("groups", {})}.items():
        num = counts.get(name) or sum(counts[task] for task in _leaves(name, result))
        scores[name] = _metrics(metrics, num)
    return TaskScores(
        tasks=scores,
        num_fewshot=dict(result["n-shot"]),
        questions=[
            _question(task, sample)
            for task, samples in result["samples"].items()
            for sample in samples
        ],
        num_truncated=num_truncated,
        versions=dict(result["versions"]),
    )


def _leaves(name: str, result: dict[str, Any]) -> Iterator[str]:
    children = result["group_subtasks"].get(name, [])
    if not children:
        yield name
    for child in children:
        yield from _leaves(child, result)


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
