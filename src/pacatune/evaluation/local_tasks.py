"""Task files of a folder, as lm-eval has them; nothing in them is run."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager


def local_tasks(folder: Path) -> "TaskManager":
    """Return the tasks of a folder; nothing in it is run.

    Data files are taken relative to the folder, so that it can be moved.

    Args:
        folder: YAML files as lm-eval has them, with their data.

    Raises:
        FileNotFoundError: If there is no such folder, or no task in it.
        ValueError: If a file is damaged or wants code to be run.
    """
    from lm_eval.tasks import TaskManager

    files = sorted(folder.rglob("*.yaml"))
    if not files:
        raise FileNotFoundError(
            f"{str(folder)!r} has no task (*.yaml); make one with `pacatune evaluate mmlu-data`."
        )
    for file in files:
        _check_task_file(file)
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    for entry in manager.task_index.values():
        if entry.cfg is not None and entry.yaml_path is not None:
            _make_absolute(entry.cfg, entry.yaml_path.parent)
            entry.yaml_path = None  # else it is read again, and with its code
    return manager


def _check_task_file(file: Path) -> None:
    try:
        values = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        hint = "code in task files is never run" if "!function" in str(error) else "mend it"
        raise ValueError(f"{file} is not a plain YAML file ({error}); {hint}.") from error
    if not isinstance(values, dict):
        raise ValueError(f"{file} holds a {type(values).__name__}; a task file is a mapping.")
    if "class" in values:
        raise ValueError(f"{file} names a `class`; code in task files is never run.")


def _make_absolute(config: dict[str, Any], folder: Path) -> None:
    options = config.get("dataset_kwargs") or {}
    if "data_files" in options:
        options["data_files"] = _absolute(options["data_files"], folder)


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
