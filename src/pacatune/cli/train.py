"""`pacatune train`: fine-tune a model on your data, by any of several tasks."""

import json
import os
import re
import sys
from argparse import SUPPRESS
from collections.abc import Collection, Iterator
from dataclasses import fields
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from jsonargparse.typing import PositiveInt

from pacatune.cli.entry import EXIT_USER_ERROR, speaks
from pacatune.cli.options import SectionParser, refuse_unknown
from pacatune.methods import METHODS
from pacatune.names import choose
from pacatune.training.config import RunConfig, own_sections, reward_name, sections_of
from pacatune.training.config_file import check_keys, load_yaml, read_values
from pacatune.training.tasks import DEFAULT_TASK, TASKS

_SWITCHES = {
    "resume": "Continue the run in training.output_dir from its last checkpoint.",
    "auto_resume": "Continue the run in training.output_dir if it has a checkpoint, else start it; "
    "a finished one stays as it is. For launchers that repeat a command.",
    "overwrite": "Delete the files of another run in training.output_dir first.",
}
# Where TRL, transformers and we have classes of training options.
_SOURCES = (
    *("trainer/*_config.py", "experimental/*/*_config.py"),
    *("training_args.py", "training/arguments.py"),
)
_Files = dict[str, dict[str, Any]]
"""Path of a config file -> what it says."""
_FLAGS = (*_SWITCHES, "preview")
_PRINT = "--print_config"
# What most runs set, of each task what it has; the options of a method are beside.
_COMMON = (
    *("config", "task", "method", "adapter", "reward"),
    *("model.path", "model.quantization", "data.path", "data.eval_path", "data.format"),
    *("training.output_dir", "training.num_train_epochs", "training.max_steps"),
    "training.learning_rate",
    *("training.per_device_train_batch_size", "training.gradient_accumulation_steps"),
    *("training.max_length", "training.gradient_checkpointing"),
    *("resume", "overwrite", "preview"),
)


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
    auto_resume = flags.pop("auto_resume", False)
    if auto_resume and flags.keys() & {"resume", "overwrite"}:
        raise ValueError("--auto_resume decides what --resume and --overwrite say; drop these.")
    num_gpus = 0 if config.training.use_cpu else torch.cuda.device_count()
    if num_gpus > 1 and "LOCAL_RANK" not in os.environ:
        return _run_on_gpus(num_gpus, words)
    (start_or_resume if auto_resume else train)(config, **flags)
    return 0


def read(argv: list[str]) -> tuple[RunConfig, dict[str, Any]]:
    """Return the run that words and their config files ask for, and its flags.

    What is wrong with them is a ValueError. Shows help or a config file instead where asked.
    """
    words, rewards = take_rewards(argv)
    files = {path: read_values(Path(path)) for path in values_of(words, "config")}
    # Which says what options there are.
    task = find_value("task", TASKS, words, files) or DEFAULT_TASK
    _check_names(task, words, files)
    if {"-h", "--help"} & {*words}:
        method = find_value("method", TASKS[task].methods, words, files)
        print(help_text(task, method, shows_all="all" in words))
        raise SystemExit(0)
    parser = parser_of_task(task)
    if _PRINT in words:
        parser.parse_args([_PRINT + "=comments" if w == _PRINT else w for w in words])
    options = parser.parse_args(words, defaults=False).as_dict()
    if options.setdefault("task", task) != task:
        raise ValueError(
            f"`task` ({options['task']!r}) of a config file is another one than `--task` "
            f"({task!r}); give one of them."
        )
    options.pop("config", None)
    flags = {name: options.pop(name) for name in _FLAGS if name in options}
    config = RunConfig(**options)
    for name in map(reward_name, config.reward):
        if name not in rewards:
            raise ValueError(
                f"`reward` ({name!r}) is a Python function, and a config file runs no code by "
                f"itself; give it on the command line: --reward {name}"
            )
    return config, flags


def parser_of_task(task: str) -> SectionParser:
    """Return a parser with one option per field of a task's runs and of their sections.

    Docstrings are read for it, which takes half a second.
    """
    others, sections = ", ".join(name for name in TASKS if name != task), sections_of(task)
    parser = SectionParser(
        "train",
        f"Fine-tune a language model. These are the options of the task {task}; those of "
        f"others ({others}) are shown with --task NAME --help. Options of a config file come "
        "first, options here override them.",
        print_config=_PRINT,
    )
    parser.add_argument("--config", action="config", help="YAML file with options.")
    for name, text in _SWITCHES.items():
        parser.add_argument(f"--{name}", action="store_true", default=SUPPRESS, help=text)
    parser.add_argument(
        "--preview",
        type=PositiveInt,
        metavar="N",
        default=SUPPRESS,
        help="Show N examples with what is learned of them, and stop.",
    )
    parser.add_class_arguments(RunConfig, skip={*sections, *TASKS[task].lacks})
    for name, section in sections.items():
        parser.add_class_arguments(section, name)
    parser.set_defaults({"task": task})
    # TRL and transformers have the help of most training options in their fields.
    helps = {f"training.{f.name}": f.metadata.get("help") for f in fields(sections["training"])}
    for action in parser._actions:
        action.help = helps.get(action.dest) or action.help
    if sys.modules.get("torch", task) is None:  # where only options are shown
        parser.set_defaults({"training.optim": "adamw_torch_fused"})
    return parser


def help_text(task: str, method: str | None, *, shows_all: bool) -> str:
    """Return the help of all options, or of those that most runs set with this method."""
    parser, shown = parser_of_task(task), [*_COMMON, "paca.r", "paca.target_modules"]
    if shows_all:
        return parser.format_help()
    if method is not None:
        starts = tuple(f"{section}." for section in METHODS[method].sections)
        shown = [*_COMMON, *(a.dest for a in parser._actions if a.dest.startswith(starts))]
    others = [action for action in parser._actions if action.dest not in shown]
    for action in others:
        action.help = SUPPRESS
    for group in parser._action_groups:
        group.title, group.description = group.title and group.title.split(" (")[0], None
    kind = TASKS[task].arguments.rpartition(".")[2]
    parser.usage = f"{parser.prog} [OPTIONS]"
    parser.epilog = (
        f"{len(others)} more, among them every option of {kind} and of other methods: "
        f"--help all; {_PRINT} writes them as a config file."
    )
    return parser.format_help()


def _check_names(task: str, argv: list[str], files: _Files) -> None:
    """Refuse unknown options and unknown keys of config files, before TRL is imported."""
    sections = {name: [f.name for f in fields(own)] for name, own in own_sections(task).items()}
    kind = TASKS[task].arguments.rpartition(".")[2]
    sections["training"] = ["output_dir", *fields_in_source(kind)]
    keys = {f.name for f in fields(RunConfig)} - {*TASKS[task].lacks, *sections}
    for section, names in sections.items():
        keys |= {f"{section}.{name}" for name in names}
        for value in values_of(argv, section):
            if not value.startswith("{"):
                raise ValueError(
                    f"`--{section}` ({value!r}) is a section of options; did you mean "
                    f"--{section}.{names[0]}?"
                )
    others = ("help", "config", "print_config", *_FLAGS, *sections)
    refuse_unknown(argv, [f"--{name}" for name in (*keys, *others)])
    for path, values in files.items():
        for flag in set(_FLAGS) & values.keys():
            raise ValueError(f"{path}: {flag!r} belongs on the command line, as --{flag}.")
        check_keys(values, keys, path)


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


@cache
def fields_in_source(name: str) -> set[str]:
    """Return the fields of a class of training options and of its bases, read from their source.

    To import it takes seconds, which a wrong word need not wait for.
    """
    head = re.compile(rf"^class {name}(?:\((.*)\))?:\n((?:    .*\n|\n)*)", re.MULTILINE)
    for package in ("trl", "transformers", "pacatune"):
        folder = Path(str(getattr(find_spec(package), "origin", ""))).parent
        for path in (file for pattern in _SOURCES for file in folder.glob(pattern)):
            if match := head.search(path.read_text(encoding="utf-8")):
                bases, body = match.groups()
                own = re.findall(r"^    ([a-z]\w*): (?!ClassVar)", body, re.MULTILINE)
                return {*own}.union(*map(fields_in_source, re.findall(r"\w+", bases or "")))
    return set()


def find_value(option: str, among: Collection[str], argv: list[str], files: _Files) -> str | None:
    """Return the choice that the words make for an option, or else a config file of theirs."""
    if words := [*values_of(argv, option)]:
        return choose(words[-1], among, option=f"--{option}")
    for path, values in files.items():
        if (value := values.get(option)) is not None:
            return choose(str(value), among, option=f"{option} of {path}")
    return None


def values_of(argv: list[str], flag: str) -> Iterator[str]:
    """Yield what is given to a flag, as `--flag VALUE` or `--flag=VALUE`."""
    for position, word in enumerate(argv):
        if word == f"--{flag}" and position + 1 < len(argv):
            yield argv[position + 1]
        elif word.startswith(f"--{flag}="):
            yield word.partition("=")[2]


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
