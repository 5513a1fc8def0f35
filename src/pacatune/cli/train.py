"""`pacatune train`: fine-tune a model on your data, by any of several tasks."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pacatune.cli.run_early import check_files, check_options
from pacatune.cli.run_options import RunOptions, carry_out, values_of
from pacatune.names import choose
from pacatune.training.config_file import load_yaml, read_values
from pacatune.training.tasks import DEFAULT_TASK, TASKS, run_class_of

if TYPE_CHECKING:
    from jsonargparse import Namespace

FLAGS = {
    "preview": {
        "type": int | None,
        "metavar": "N",
        "help": "Show N examples with what is learned of them, and stop.",
    }
}
"""What only this command has beside the options of a run."""


def run(argv: list[str]) -> int:
    """Run `pacatune train` with the words after it; return the exit status."""
    known, options, rewards = _parse(argv, with_files=True)
    if options.print_config:
        print(known.template(options), end="")
        return 0

    from pacatune.training import preview

    config = known.to_config(options)
    refuse_unnamed_code(config, rewards)
    if options.preview is not None and options.preview < 1:
        raise ValueError(f"`--preview` ({options.preview}) must be at least 1.")
    if options.preview is not None:
        preview(config, options.preview)
        return 0
    carry_out(config, options)
    return 0


def read_run(argv: list[str]) -> Any:
    """Return the run that the words describe, refused as the command would refuse it."""
    known, options, rewards = _parse(argv)
    config = known.to_config(options)
    refuse_unnamed_code(config, rewards)
    return config


def _parse(
    argv: list[str], *, with_files: bool = False
) -> "tuple[RunOptions, Namespace, list[str]]":
    """Return all options, what the words give them, and the rewards among the words.

    With `with_files`, refuse models and data that are not there.
    """
    task = find_task(argv)
    words, rewards = take_rewards(argv)
    if not {"-h", "--help"} & {*words}:
        given = check_options(words, "train", TASKS[task], FLAGS)
        if with_files:
            check_files(given, task)
    known = all_options(task)
    return known, known.parse(words), rewards


def all_options(task: str = DEFAULT_TASK) -> RunOptions:
    """Return the options of the command for a task."""
    others = ", ".join(name for name in TASKS if name != task)
    return RunOptions(
        run_class_of(task),
        f"Fine-tune a language model. These are the options of the task {task}; those of others "
        f"({others}) are shown with --task NAME --help.",
        FLAGS,
    )


def find_task(argv: list[str]) -> str:
    """Return the task that the command line or a config file names, which says what options are."""
    named = list(values_of(argv, "task"))
    task = choose(named[-1], TASKS, option="--task") if named else None
    for path in values_of(argv, "config"):
        value = read_values(Path(path)).get("task")
        if value is None:
            continue
        found = choose(str(value), TASKS, option=f"task of {path}")
        if task is not None and found != task:
            raise ValueError(
                f"`--task` ({task!r}): {path} has the options of the task {found!r}; give that, or "
                "another file."
            )
        task = found
    return task or DEFAULT_TASK


def take_rewards(argv: list[str]) -> tuple[list[str], list[str]]:
    """Return the words with all of `--reward` as one list, and the rewards."""
    words, rewards = [], []
    for word, value in _pairs(argv):
        if value is None:
            words.append(word)
        else:
            found = load_yaml(value) if value.startswith("[") else value
            rewards += [str(one) for one in found] if isinstance(found, list) else [str(found)]
    if rewards:
        words.append(f"--reward={[*rewards]}".replace("'", '"'))
    return words, rewards


def _pairs(argv: list[str]) -> Iterator[tuple[str, str | None]]:
    """Yield words, and with each `--reward` its value."""
    words = iter(argv)
    for word in words:
        flag, has_value, value = word.partition("=")
        if flag not in ("--reward", "--reward+"):
            yield word, None
        else:
            yield flag, value if has_value else next(words, "")


def refuse_unnamed_code(config: Any, rewards: list[str]) -> None:
    """Refuse Python functions that a config file names and the command line does not."""
    for name in getattr(config, "code", list)():
        if name not in rewards:
            raise ValueError(
                f"`reward` ({name!r}) is a Python function, and a config file runs no code by "
                f"itself; give it on the command line: --reward {name}"
            )
