"""Any task of lm-eval: its own, MMLU among them, or one of a local folder whose code is not run."""

import re
from collections.abc import Sequence
from contextlib import chdir
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from pacatune.evaluation.harness import TaskScores, quiet_lm_eval, require_lm_eval, to_scores

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager

_CODE = re.compile(r"!function|^['\"]?class['\"]?\s*:", re.MULTILINE)


def evaluate_tasks(
    model: Any,
    tokenizer: Any,
    tasks: Sequence[Any],
    *,
    tasks_dir: str | Path | None = None,
    num_fewshot: int | None = None,
    limit: int | None = None,
    batch_size: int = 8,
    chat: bool = False,
    seed: int = 0,
    progress: bool = False,
    keep_line_break: bool = False,
) -> TaskScores:
    """Score a model on tasks of lm-eval.

    Args:
        model: A causal language model, or a PEFT model around one; put into evaluation mode.
        tokenizer: Its tokenizer; gets a padding token if it has none.
        tasks: Names of tasks or groups, such as `mmlu` or `arc_easy`; or what `prepare_tasks`
            returned, or configurations of tasks.
        tasks_dir: Folder with task files of your own, taken instead; code in them is not run.
            Paths of data in them are relative to the folder.
        num_fewshot: Examples in each prompt; None takes what the tasks say.
        limit: Questions per task at most, the first ones.
        batch_size: Prompts that are evaluated at once.
        chat: Write prompts by the chat template.
        seed: Seed for examples drawn at random.
        progress: Whether to show a bar.
        keep_line_break: As for `LanguageModel`.

    Returns:
        Scores with standard errors by task and group, and every question with its scores.

    Raises:
        ValueError: If a number is out of range, a task is unknown, or there is no chat template.
    """
    for name, value, least in (("limit", limit, 1), ("num_fewshot", num_fewshot, 0)):
        if value is not None and value < least:
            raise ValueError(f"`{name}` ({value}) must be at least {least}, or left out.")
    if chat and not tokenizer.chat_template:
        raise ValueError(
            "`chat` needs a chat template, which the model's tokenizer lacks; leave it out, or "
            "take an instruction-tuned model."
        )
    if all(isinstance(one, str) for one in tasks):
        tasks = prepare_tasks(tasks, tasks_dir)
    from pacatune.evaluation.language_model import LanguageModel

    lm = LanguageModel(
        model, tokenizer, batch_size=batch_size, progress=progress, keep_line_break=keep_line_break
    )
    how = {"limit": limit, "num_fewshot": num_fewshot, "fewshot_random_seed": seed}
    result = _simple_evaluate(lm, tasks, chat, **how)
    return to_scores(result, lm.num_truncated)


def _simple_evaluate(lm: Any, tasks: Sequence[Any], chat: bool, **how: int | None) -> Any:
    import lm_eval
    from lm_eval.tasks import TaskManager

    try:
        with quiet_lm_eval():
            return lm_eval.simple_evaluate(
                model=lm,
                tasks=list(tasks),
                task_manager=TaskManager(include_defaults=False),
                apply_chat_template=chat,
                fewshot_as_multiturn=chat,
                bootstrap_iters=1000,
                # None: it would seed the global generators.
                random_seed=None,
                numpy_random_seed=None,
                torch_random_seed=None,
                **how,
            )
    except AssertionError as error:
        if "fewshot samples" not in str(error):
            raise
        raise ValueError(f"`num_fewshot` is too many: {error} Lower it.") from error


def prepare_tasks(tasks: Sequence[str], tasks_dir: str | Path | None = None) -> list[Any]:
    """Load tasks and groups and their data, which needs no model."""
    require_lm_eval()
    folder = Path.cwd() if tasks_dir is None else Path(tasks_dir).expanduser()
    with quiet_lm_eval():
        manager = _manager(tasks, None if tasks_dir is None else folder)
        for name in tasks:
            if name not in manager.task_index:
                near = get_close_matches(name, manager.all_tasks, n=5, cutoff=0)
                raise ValueError(f"unknown task {name!r}; the nearest are {', '.join(near)}.")
        with chdir(folder):
            return [one for name in tasks for one in _load(manager, name)]


def _manager(tasks: Sequence[str], folder: Path | None) -> "TaskManager":
    import lm_eval
    from lm_eval.tasks import TaskManager

    if folder is None:
        # MMLU's files alone: lm-eval reads all of its 14,000 in ten seconds.
        mmlu = Path(str(lm_eval.__file__)).parent / "tasks" / "mmlu" / "default"
        manager = TaskManager(include_path=mmlu, include_defaults=False)
        return manager if set(tasks) <= set(manager.task_index) else TaskManager()
    files = list(folder.rglob("*.yaml"))
    if not files:
        raise FileNotFoundError(f"{str(folder)!r} has no task (*.yaml); see docs/evaluate.md.")
    for file in files:  # and what they include: lm-eval would take its code for text
        text = file.read_text(encoding="utf-8")
        if _CODE.search(text):
            raise ValueError(f"{file} names a function or class; code in task files is never run.")
        try:
            found = (yaml.safe_load(text) or {}).get("include") or []
        except (yaml.YAMLError, AttributeError) as error:
            raise ValueError(f"{file} is no YAML mapping ({error}); mend it.") from error
        included = [(file.parent / n).resolve() for n in ([found] if type(found) is str else found)]
        files += [one for one in included if one not in files]
    manager = TaskManager(include_path=folder, include_defaults=False)
    for entry in manager.task_index.values():
        entry.yaml_path = None  # else it is read again, with the code of files that it includes
    return manager


def _load(manager: "TaskManager", name: str) -> list[Any]:
    """Load what a name stands for and its data: a task, a group, or the tasks of a tag."""
    try:
        found: Any = manager.load([name])
    except Exception as error:
        # Besides the hub's and data sets' dozen errors, tasks import packages of their own.
        raise OSError(
            f"the data of {name} cannot be had ({type(error).__name__}: "
            f"{' '.join(str(error).split())[:300]}); see that the hub can be reached and that the "
            "task's own packages are installed, or give task files of local data: --tasks_dir."
        ) from error
    return [found["groups"][name]] if name in found["groups"] else list(found["tasks"].values())
