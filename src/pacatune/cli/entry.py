"""The table of commands and what they share: help, version, and clean error lines."""

import importlib
import logging
import os
import re
import sys
import traceback
import warnings
from collections.abc import Sequence
from pathlib import Path

from pacatune.installation import require_extra
from pacatune.names import did_you_mean

# Each command is the module `pacatune.cli.NAME` (`-` as `_`) with `run(argv: list[str]) -> int`.
COMMANDS = {
    "train": "fine-tune a model on your data",
    "train-image": "fine-tune an image classifier on your images",
    "generate": "stream text from a model, with or without an adapter",
    "evaluate": "score a model or adapter: MMLU, lm-eval's tasks, MT-Bench, choices, perplexity",
    "merge": "write an adapter into its base model: a plain model folder",
    "export": "turn an adapter into an exact LoRA adapter for any server",
    "patch": "an adapter as an exact edit of a checkpoint: make, apply, revert, diff, stack",
    "estimate": "estimate the memory of training, without a GPU or weights",
    "inspect": "show what an adapter holds and what it fits",
    "compare": "compare methods on one task: rates, seeds, table, test",
    "bench": "measure the methods on this machine: time, operations, memory, limits",
    "reproduce": "put the paper's tables and figures beside what is found here",
    "completion": "print a script by which bash, zsh or fish completes commands and options",
}

# The extra of each command that needs more than the core (pyproject.toml).
EXTRAS = {
    "train": "train",
    "train-image": "vision",
    "evaluate": "eval",
    "estimate": "train",
    "compare": "train",
    "bench": "train",
    "reproduce": "train",
    "completion": "train",
}

_NEGATIVE = re.compile(r"-(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?")

EXIT_USER_ERROR = 2
EXIT_BROKEN_PIPE = 141
EXIT_INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return the exit status of the process.

    Errors that a user can mend (ValueError, TypeError, OSError) become one line on stderr;
    `pacatune --debug COMMAND ...` shows their traceback instead. Anything else is a defect
    and keeps its traceback.

    Args:
        argv: Words after `pacatune`; those of the process when None.

    Returns:
        0 on success, 2 for a user error, 130 when interrupted, 141 when the reader of the output
        has left, else what the command returns.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    is_run = not {"train", "train-image"}.isdisjoint(words[:2])
    if argv is None and is_run and {"-h", "--help", "--print_config"} & {*words}:
        _hide_torch()
    try:
        try:
            return _main(words)
        finally:
            # What is still buffered would fail while Python ends, where nobody can catch it.
            sys.stdout.flush()
    except BrokenPipeError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for stream in (sys.stdout, sys.stderr):
            os.dup2(nowhere, stream.fileno())
        return EXIT_BROKEN_PIPE


def _main(words: list[str]) -> int:
    debug = words[:1] == ["--debug"]
    if debug:
        words = words[1:]
    if not words or words[0] in ("-h", "--help", "help"):
        print(_usage())
        return 0 if words else EXIT_USER_ERROR
    if words[0] in ("-V", "--version"):
        print(f"pacatune {_version()}")
        return 0
    try:
        return _run_command(words[0], _with_numbers(words[1:]))
    except KeyboardInterrupt as interrupt:
        # Training says where it stopped and how to go on.
        print(f"pacatune: {str(interrupt) or 'interrupted'}", file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        raise  # an OSError that is no error of the user's
    except (ValueError, TypeError, OSError, ImportError) as error:
        if debug:
            traceback.print_exc()
        print(f"pacatune: error: {_describe(error)}", file=sys.stderr)
        return EXIT_USER_ERROR


def _hide_torch() -> None:
    """Have this process, which only shows options, read TRL's and transformers' in a second.

    With torch and PEFT, they take many.
    """
    sys.modules |= {"torch": None, "peft": None}  # type: ignore[dict-item]
    logging.getLogger("transformers").addFilter(lambda record: "PyTorch" not in record.msg)


def _with_numbers(words: list[str]) -> list[str]:
    """Write `--option -1e-3` as `--option=-1e-3`, which argparse does not take for an option."""
    joined: list[str] = []
    for word in words:
        last = joined[-1] if joined else ""
        if _NEGATIVE.fullmatch(word) and last.startswith("--") and "=" not in last:
            joined[-1] = f"{last}={word}"
        else:
            joined.append(word)
    return joined


def _run_command(name: str, argv: list[str]) -> int:
    if name not in COMMANDS:
        kind = "option" if name.startswith("-") else "command"
        hint = did_you_mean(name, COMMANDS)
        raise ValueError(f"unknown {kind} {name!r}; {hint} See `pacatune --help`.")
    if name in EXTRAS:
        require_extra(f"`pacatune {name}`", EXTRAS[name])
    _silence_dependencies()
    module = importlib.import_module(f"pacatune.cli.{name.replace('-', '_')}")
    status: int = module.run(argv)
    return status


def _silence_dependencies() -> None:
    """Hide what a user of a command can do nothing about."""
    # A hint about an optional kernel of bitsandbytes, wherever that is installed.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    # Deprecations between the packages that we build on.
    for package in ("transformers", "trl", "peft", "accelerate", "datasets", "torch"):
        warnings.filterwarnings("ignore", category=FutureWarning, module=rf"{package}\b")


def _describe(error: Exception) -> str:
    """Return the message on one line; say where it came from if that was not our own check."""
    message = " ".join(str(error).split()) or type(error).__name__
    frames = traceback.extract_tb(error.__traceback__)
    if not frames or Path(frames[-1].filename).is_relative_to(Path(__file__).parents[1]):
        return message
    place = "/".join(Path(frames[-1].filename).parts[-2:])
    return (
        f"{message} ({type(error).__name__} from {place}:{frames[-1].lineno}; "
        "`pacatune --debug COMMAND ...` shows where)"
    )


def _usage() -> str:
    width = max(map(len, COMMANDS))
    table = "\n".join(f"  {name:<{width}}  {text}" for name, text in COMMANDS.items())
    return (
        "usage: pacatune [--debug] COMMAND [OPTIONS]\n\n"
        "Fine-tune a few columns of each pretrained weight in place (PaCA).\n\n"
        f"commands:\n{table}\n\n"
        "options:\n"
        "  --debug        show the traceback of an error\n"
        "  -V, --version  show the version\n"
        "  -h, --help     show this text\n\n"
        "`pacatune COMMAND --help` lists the options of a command."
    )


def _version() -> str:
    from pacatune.reports.provenance import package_version

    return str(package_version("pacatune"))
