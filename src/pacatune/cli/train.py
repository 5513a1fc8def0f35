"""`pacatune train`: fine-tune a model on your data, by any of several tasks."""

import json
import os
from typing import Any

from pacatune.cli.entry import EXIT_USER_ERROR, speaks
from pacatune.cli.run_options import RunOptions, find_value
from pacatune.training.config import RunConfig
from pacatune.training.config_file import load_yaml
from pacatune.training.tasks import DEFAULT_TASK, TASKS


def run(argv: list[str], words: list[str]) -> int:
    """Train as the words say: anew, or going on; or show the data.

    Args:
        argv: The words after `train`.
        words: Those after `pacatune`; on several GPUs, each runs them.
    """
    try:
        config, flags = read(argv)
    except (ValueError, OSError):
        if not speaks():
            return EXIT_USER_ERROR
        raise

    import torch

    from pacatune.training.language import preview
    from pacatune.training.recipe import start_or_resume, train

    if "preview" in flags:
        preview(config, int(flags["preview"]))
        return 0
    if "push_config" in flags and "push_to_hub" not in flags:
        raise ValueError("--push_config needs --push_to_hub, which uploads the result.")
    auto_resume = flags.pop("auto_resume", False)
    if auto_resume and flags.keys() & {"resume", "overwrite"}:
        raise ValueError("--auto_resume decides what --resume and --overwrite say; drop these.")
    num_gpus = 0 if config.training.use_cpu else torch.cuda.device_count()
    if num_gpus > 1 and "LOCAL_RANK" not in os.environ:
        return _run_on_gpus(num_gpus, words)
    (start_or_resume if auto_resume else train)(config, **flags)
    return 0


def read(argv: list[str]) -> tuple[RunConfig, dict[str, Any]]:
    """Return the run that the words ask for, and its flags."""
    words, rewards = take_rewards(argv)
    # Which says what options there are.
    task = find_value(argv, "task", TASKS) or DEFAULT_TASK
    options, flags = RunOptions(task).parse(words)
    config = RunConfig(**options)
    for name in config.code():
        if name not in rewards:
            raise ValueError(
                f"`reward` ({name!r}) is a Python function, and a config file runs no code by "
                f"itself; give it on the command line: --reward {name}"
            )
    return config, flags


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


def _run_on_gpus(number: int, words: list[str]) -> int:
    """Run the words in a process for each GPU, as torchrun does; return the exit status."""
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import parse_args, run

    print(f"{number} GPUs, a process on each; CUDA_VISIBLE_DEVICES=0 takes one", flush=True)
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # as torchrun does, with a warning
    how = ["--standalone", "--nproc_per_node", str(number), "-m", "pacatune"]
    try:
        run(parse_args([*how, *words]))
    except ChildFailedError as error:  # the process has said why
        return int(error.get_first_failure()[1].exitcode)
    except SignalException as stop:
        raise KeyboardInterrupt from stop
    return 0
