"""`pacatune train`: fine-tune a model on your data, by any of several tasks."""

import json

from pacatune.cli.run_options import Request, RunOptions, find_value
from pacatune.training.config_file import load_yaml
from pacatune.training.tasks import DEFAULT_TASK, TASKS


def read(argv: list[str]) -> Request:
    """Return what the words ask for; refuse what can be seen to be wrong without torch."""
    words, rewards = take_rewards(argv)
    # Which says what options there are.
    task = find_value(argv, "task", TASKS) or DEFAULT_TASK
    request = RunOptions(task).parse(words)
    for name in request.check().code():
        if name not in rewards:
            raise ValueError(
                f"`reward` ({name!r}) is a Python function, and a config file runs no code by "
                f"itself; give it on the command line: --reward {name}"
            )
    return request


def take_rewards(argv: list[str]) -> tuple[list[str], list[str]]:
    """Return the words with all of `--reward` as one list, and the rewards."""
    words, rewards, rest = [], list[str](), iter(argv)
    for word in rest:
        flag, has_value, value = word.partition("=")
        if flag not in ("--reward", "--reward+"):
            words.append(word)
            continue
        value = value if has_value else next(rest, "")
        rewards += load_yaml(value) if value.startswith("[") else [value]
    if rewards:
        words.append(f"--reward={json.dumps(rewards)}")
    return words, rewards
