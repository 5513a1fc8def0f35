"""MMLU by lm-eval: four categories and their average, as in Table 1 of the paper."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pacatune.data.choices import to_question
from pacatune.data.read import read_rows
from pacatune.evaluation.harness import (
    PreparedTasks,
    Score,
    TaskScores,
    require_lm_eval,
    run_tasks,
)
from pacatune.evaluation.mmlu_data import NUM_FEWSHOT, lm_eval_folder
from pacatune.evaluation.tasks import load_task, local_tasks
from pacatune.names import did_you_mean

CATEGORIES = {
    "Hums.": "mmlu_humanities",
    "STEM": "mmlu_stem",
    "Social.": "mmlu_social_sciences",
    "Other": "mmlu_other",
}
"""Column of the paper's Table 1 -> lm-eval's group."""


@dataclass(frozen=True, kw_only=True)
class MmluResult:
    """Accuracies on MMLU."""

    categories: dict[str, Score]
    """By the names of Table 1; a category without questions is missing."""
    average: Score
    """Over all questions, so that large subjects count more, as lm-eval and the paper have it."""
    subjects: dict[str, Score]
    num_fewshot: tuple[int, int]
    """Examples in each prompt, of the subject with the fewest and with the most."""
    num_truncated: int
    """Prompts longer than the model's context, which lost their first examples."""
    questions: list[dict[str, Any]] = field(repr=False)
    """One per question: task, number, answer, log-likelihoods of A to D, acc."""


def evaluate_mmlu(
    model: Any,
    tokenizer: Any,
    *,
    tasks_dir: str | Path | None = None,
    subjects: Sequence[str] | None = None,
    num_fewshot: int | None = None,
    limit: int | None = None,
    batch_size: int = 8,
    chat: bool = False,
    progress: bool = False,
) -> MmluResult:
    """Score a model on MMLU with lm-eval's task `mmlu`.

    Args:
        model: As for `evaluate_tasks`, as are those that are not here.
        tokenizer: Its tokenizer.
        tasks_dir: Folder of the tasks, as `pacatune evaluate mmlu-data` writes it; None takes
            lm-eval's own, whose data comes from the hub.
        subjects: Such as `anatomy`; None asks all that there are.
        num_fewshot: Examples in each prompt; None takes what the tasks say, else 5.
        limit: Questions per subject at most, the first ones.
        batch_size: Prompts that are evaluated at once.
        chat: Write prompts by the chat template, which the paper does not.
        progress: Whether to show a bar.
    """
    tasks = prepare_mmlu(tasks_dir, subjects, num_fewshot=num_fewshot)
    scores = run_tasks(
        model, tokenizer, tasks, limit=limit, batch_size=batch_size, chat=chat, progress=progress
    )
    return mmlu_result(scores)


def prepare_mmlu(
    tasks_dir: str | Path | None = None,
    subjects: Sequence[str] | None = None,
    *,
    num_fewshot: int | None = None,
) -> PreparedTasks:
    """Load the tasks and their data, and see that they can be asked; needs no model."""
    require_lm_eval()
    if num_fewshot is not None and num_fewshot < 0:
        raise ValueError(f"`num_fewshot` ({num_fewshot}) must be at least 0.")
    # lm-eval's own tasks have their data on the hub.
    manager = local_tasks(lm_eval_folder() / "default" if tasks_dir is None else tasks_dir)
    index = manager.task_index
    if "mmlu" not in index:
        raise ValueError(
            f"{str(tasks_dir)!r} has no task `mmlu`; make it with `pacatune evaluate mmlu-data`."
        )
    if subjects is not None:
        _choose_subjects(index, subjects)
    for entry in filter(_is_task, index.values()):
        if num_fewshot is not None:
            entry.cfg["num_fewshot"] = num_fewshot
        entry.cfg.setdefault("num_fewshot", NUM_FEWSHOT)
        _check_rows(entry)
    hint = "make a folder of it with `pacatune evaluate mmlu-data`."
    if tasks_dir is None:
        hint = f"it is cais/mmlu on the hub; without network, {hint[:-1]} and give --tasks-dir."
    whole = load_task(manager, "mmlu", hint)
    for task in whole.get_all_tasks():
        _check_examples(task)
    return PreparedTasks(manager, [whole])


def _choose_subjects(index: dict[str, Any], subjects: Sequence[str]) -> None:
    known = {name.removeprefix("mmlu_") for name, entry in index.items() if _is_task(entry)}
    for subject in subjects:
        if subject not in known:
            hint = did_you_mean(subject, sorted(known))
            raise ValueError(f"`subjects` names {subject!r}, which is not there; {hint}")
    wanted = {f"mmlu_{subject}" for subject in subjects}
    for group in CATEGORIES.values():
        if group in index:
            # A group of lm-eval's own names a tag, which stands for its subjects.
            members = index[group].cfg["task"]
            found = [sorted(index[one].tags or [one]) if one in index else [one] for one in members]
            index[group].cfg["task"] = [n for names in found for n in names if n in wanted]
    index["mmlu"].cfg["task"] = [g for g in index["mmlu"].cfg["task"] if index[g].cfg["task"]]


def _is_task(entry: Any) -> bool:
    return entry.cfg is not None and "test_split" in entry.cfg


def _check_rows(entry: Any) -> None:
    """Read local data once ourselves: lm-eval would not say which row is damaged."""
    files = (entry.cfg.get("dataset_kwargs") or {}).get("data_files")
    for file in files.values() if isinstance(files, dict) else []:
        if isinstance(file, str) and Path(file).is_file():
            for row in read_rows(file):
                to_question(row)


def _check_examples(task: Any) -> None:
    """Refuse more examples than there are; the question itself is never its own example."""
    examples = list(task.fewshot_docs())
    available = len(examples)
    if task.fewshot_cfg.split == task.config.test_split:
        available = min(sum(other != one for other in examples) for one in examples)
    if task.config.num_fewshot > available:
        raise ValueError(
            f"`num_fewshot` ({task.config.num_fewshot}) is more than the {available} examples of "
            f"{task.config.task}; lower it to {available}."
        )


def mmlu_result(scores: TaskScores) -> MmluResult:
    """Return what lm-eval says about the tasks of `prepare_mmlu` in the terms of MMLU."""
    tasks = {name: _with_stderr(each["acc"]) for name, each in scores.tasks.items()}
    subjects = [name for name in tasks if name not in (*CATEGORIES.values(), "mmlu")]
    shots = [scores.num_fewshot[name] for name in subjects]
    return MmluResult(
        categories={title: tasks[group] for title, group in CATEGORIES.items() if group in tasks},
        average=tasks["mmlu"],
        subjects={name.removeprefix("mmlu_"): tasks[name] for name in subjects},
        num_fewshot=(min(shots), max(shots)),
        num_truncated=scores.num_truncated,
        questions=scores.questions,
    )


def _with_stderr(score: Score) -> Score:
    """Fill in what lm-eval cannot pool: subjects with one question have no spread of their own."""
    if score.stderr is not None or score.num_questions < 2:
        return score
    variance = score.value * (1 - score.value) / (score.num_questions - 1)
    return replace(score, stderr=math.sqrt(variance))
