"""Any task of lm-eval, its own or one of a local folder, of which no code is run."""

from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from pacatune.evaluation.harness import (
    PreparedTasks,
    TaskScores,
    quiet_lm_eval,
    require_lm_eval,
    run_tasks,
)

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager


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
        seed: Seed for examples drawn at random.
        progress: Whether to show a bar.
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
    """Load tasks and their data, which needs no model."""
    require_lm_eval()
    from lm_eval.tasks import TaskManager

    with quiet_lm_eval():
        manager = TaskManager() if tasks_dir is None else local_tasks(tasks_dir)
    for name in tasks:
        if name not in manager.task_index:
            near = get_close_matches(name, manager.all_tasks, n=5, cutoff=0)
            raise ValueError(f"unknown task {name!r}; the nearest are {', '.join(near)}.")
    hint = "see that the hub can be reached and that the task's own packages are installed."
    return PreparedTasks(manager, [load_task(manager, name, hint) for name in tasks])


def load_task(manager: "TaskManager", name: str, hint: str) -> Any:
    """Load what a name stands for and its data; a tag is given as a group of its tasks."""
    from lm_eval.api.group import Group

    try:
        with quiet_lm_eval():
            loaded: Any = manager.load([name])
    except Exception as error:
        # Besides the hub's and data sets' dozen errors, tasks import packages of their own.
        raise OSError(
            f"the data of {name} cannot be had ({type(error).__name__}: "
            f"{' '.join(str(error).split())[:300]}); {hint}"
        ) from error
    for kind in ("groups", "tasks"):
        if name in loaded[kind]:
            return loaded[kind][name]
    group = Group(name=name)
    for task in loaded["tasks"].values():
        group.add(task)
    return group


def local_tasks(folder: str | Path) -> "TaskManager":
    """Return the tasks of a folder; data files are relative to it, so that it can be moved."""
    from lm_eval.tasks import TaskManager

    files = sorted(Path(folder).expanduser().rglob("*.yaml"))
    if not files:
        raise FileNotFoundError(
            f"{str(folder)!r} has no task (*.yaml); make one with `pacatune evaluate mmlu-data`."
        )
    for file in files:
        # What is found included is checked too; lm-eval would take its code for text.
        files += [one for one in _check_task_file(file) if one not in files]
    manager = TaskManager(include_path=str(Path(folder).expanduser()), include_defaults=False)
    for entry in manager.task_index.values():
        if entry.cfg is not None and entry.yaml_path is not None:
            options = entry.cfg.get("dataset_kwargs") or {}
            if "data_files" in options:
                options["data_files"] = _absolute(options["data_files"], entry.yaml_path.parent)
            entry.yaml_path = None  # else it is read again, and with its code
    return manager


def _check_task_file(file: Path) -> list[Path]:
    """Refuse a file that wants code to be run; return those that it includes."""
    try:
        values = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        hint = "code in task files is never run" if "!function" in str(error) else "mend it"
        raise ValueError(f"{file} is not a plain YAML file ({error}); {hint}.") from error
    if not isinstance(values, dict):
        raise ValueError(f"{file} holds a {type(values).__name__}; a task file is a mapping.")
    if "class" in values:
        raise ValueError(f"{file} names a `class`; code in task files is never run.")
    found = values.get("include", [])
    names = found if isinstance(found, list) else [found]
    return [(file.parent / name).resolve() for name in names]


def _absolute(files: Any, folder: Path) -> Any:
    """Return data files as `datasets` takes them: a name, or names in lists and by split."""
    if isinstance(files, dict):
        return {split: _absolute(each, folder) for split, each in files.items()}
    if isinstance(files, list):
        return [_absolute(each, folder) for each in files]
    if "://" in files or "*" in files:
        return files
    path = (folder / files).resolve()
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing, data of a task; make the folder anew.")
    return str(path)
