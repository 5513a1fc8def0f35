"""Any task of lm-eval, its own or one of a local folder."""

import math
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from pacatune.evaluation.harness import (
    PreparedTasks,
    TaskScores,
    quiet_lm_eval,
    require_lm_eval,
    run_tasks,
)
from pacatune.evaluation.local_tasks import local_tasks


def evaluate_tasks(
    model: Any,
    tokenizer: Any,
    tasks: Sequence[str],
    *,
    tasks_dir: str | Path | None = None,
    num_fewshot: int | None = None,
    limit: int | None = None,
    batch_size: int = 8,
    chat: bool = False,
    seed: int = 0,
    progress: bool = False,
) -> TaskScores:
    """Score a model on tasks of lm-eval.

    Args:
        model: A causal language model, or a PEFT model around one; put into evaluation mode.
        tokenizer: Its tokenizer; gets a padding token if it has none.
        tasks: Names of tasks or groups, such as `arc_easy`.
        tasks_dir: Folder with tasks of your own instead; code in them is not run.
        num_fewshot: Examples in each prompt; None takes what the tasks say.
        limit: Questions per task at most, the first ones.
        batch_size: Prompts that are evaluated at once.
        chat: Write prompts by the chat template.
        seed: Seed of examples that are drawn at random.
        progress: Whether to show a bar.

    Raises:
        ValueError: If lm-eval is missing or a name is unknown; suggests the nearest ones.
        FileNotFoundError: If there is no such folder.
        OSError: If a task's data cannot be had.
    """
    return run_tasks(
        model,
        tokenizer,
        prepare_tasks(tasks, tasks_dir),
        limit=limit,
        num_fewshot=num_fewshot,
        batch_size=batch_size,
        chat=chat,
        seed=seed,
        progress=progress,
    )


def prepare_tasks(tasks: Sequence[str], tasks_dir: str | Path | None = None) -> PreparedTasks:
    """Load tasks and their data; needs no model.

    Args:
        tasks: As for `evaluate_tasks`.
        tasks_dir: As for `evaluate_tasks`.

    Raises:
        ValueError: As `evaluate_tasks`.
        FileNotFoundError: As `evaluate_tasks`.
        OSError: As `evaluate_tasks`.
    """
    require_lm_eval()
    from lm_eval.tasks import TaskManager

    with quiet_lm_eval():
        manager = TaskManager() if tasks_dir is None else local_tasks(Path(tasks_dir).expanduser())
    for name in tasks:
        if name not in manager.task_index:
            near = get_close_matches(name, manager.all_tasks, n=5, cutoff=0)
            raise ValueError(f"unknown task {name!r}; the nearest are {', '.join(near)}.")
    try:
        with quiet_lm_eval():
            loaded = [manager.load([name]) for name in tasks]
    except Exception as error:
        # Besides the hub's and data sets' dozen errors, tasks import packages of their own.
        raise OSError(
            f"the data of {', '.join(tasks)} cannot be had ({type(error).__name__}: "
            f"{' '.join(str(error).split())[:300]}); see that the hub can be reached and that the "
            "task's own packages are installed."
        ) from error
    tops = [_top(name, each) for name, each in zip(tasks, loaded, strict=True)]
    return PreparedTasks(manager, tops)


def _top(name: str, loaded: dict[str, Any]) -> Any:
    """Return what a name stands for; a tag is given as a group of its tasks."""
    from lm_eval.api.group import Group

    if name in loaded["groups"]:
        return loaded["groups"][name]
    if name in loaded["tasks"]:
        return loaded["tasks"][name]
    group = Group(name=name)
    for task in loaded["tasks"].values():
        group.add(task)
    return group


def rows_of(scores: TaskScores) -> list[list[str]]:
    """Return a table's rows: task, metric, value, standard error, questions, examples."""
    rows = []
    for task, metrics in scores.tasks.items():
        for metric, score in metrics.items():
            stderr = score.stderr
            known = stderr is not None and math.isfinite(stderr)
            rows.append(
                [
                    task,
                    metric,
                    f"{score.value:.4f}",
                    f"{stderr:.4f}" if known else "-",
                    str(score.num_questions),
                    str(scores.num_fewshot.get(task, "-")),
                ]
            )
    return rows
