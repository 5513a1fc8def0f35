"""The table of commands and what they share: help, version, and clean error lines."""

import importlib.metadata
import logging
import os
import sys
import traceback
import warnings
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from pacatune.installation import require_extra
from pacatune.names import did_you_mean, spell

# Each command is the module `pacatune.cli.NAME`. It has `command`, or `SUBCOMMANDS` by their names:
# a dataclass whose fields are the options, with the method `run`. Alone `train` reads its words.
COMMANDS = {
    "train": "fine-tune a model on your data",
    "generate": "stream text from a model, with or without an adapter",
    "merge": "write an adapter into its base model: a plain model folder",
    "export": "turn an adapter into an exact LoRA adapter for any server",
    "patch": "an adapter as an exact edit of a checkpoint: make, apply, revert, diff, stack",
    "estimate": "estimate the memory of training, without a GPU or weights",
    "inspect": "show what an adapter holds and what it fits",
}

# What these show needs neither torch nor PEFT, whose import takes many seconds.
_SHOWING = {"-h", "--help", "--print_config"}

_DESCRIPTION = "Fine-tune a few columns of each pretrained weight in place (PaCA)."
_OPTIONS = """options:
  --debug        show the traceback of an error
  -V, --version  show the version
  -h, --help     show this text

"""

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
    words = spell(sys.argv[1:] if argv is None else argv)
    try:
        try:
            return _main(words, owns_process=argv is None)
        finally:
            # What is still buffered would fail while Python ends, where nobody can catch it.
            sys.stdout.flush()
    except BrokenPipeError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for stream in (sys.stdout, sys.stderr):
            os.dup2(nowhere, stream.fileno())
        return EXIT_BROKEN_PIPE


def _main(words: list[str], owns_process: bool) -> int:
    debug = words[:1] == ["--debug"]
    words = words[debug:]
    if not words or words[0] in ("-h", "--help", "help"):
        print(_usage("[--debug] COMMAND", COMMANDS, _DESCRIPTION, _OPTIONS))
        return 0 if words else EXIT_USER_ERROR
    if words[0] in ("-V", "--version"):
        from pacatune.reports.provenance import package_version

        print(f"pacatune {package_version('pacatune')}")
        return 0
    if owns_process and words[0] == "train" and _SHOWING & {*words}:
        _hide_torch()
    try:
        return _run_command(words, debug)
    except SystemExit as end:  # of --help and --print_config
        return int(end.code or 0)
    except KeyboardInterrupt as interrupt:
        # Training says where it stopped and how to go on.
        if speaks():
            print(f"pacatune: {str(interrupt) or 'interrupted'}", file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        raise  # an OSError that is no error of the user's
    except (ValueError, TypeError, OSError, ImportError) as error:
        return _tell(error, debug)


def speaks() -> bool:
    """Whether this process speaks for all that a launcher started on this machine."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


def _tell(error: Exception, debug: bool) -> int:
    """Print the message on one line, and what it is if that was not our own check."""
    if debug:
        traceback.print_exception(error)
    kind = type(error).__name__
    message = " ".join(str(error).split()) or kind
    frames = traceback.extract_tb(error.__traceback__)
    if frames and not Path(frames[-1].filename).is_relative_to(Path(__file__).parents[1]):
        message += f" ({kind}; `pacatune --debug COMMAND ...` shows where it comes from)"
    print(f"pacatune: error: {message}", file=sys.stderr)
    return EXIT_USER_ERROR


def _hide_torch() -> None:
    """Have TRL's and transformers' classes of options import in a second."""
    sys.modules |= {"torch": None, "peft": None}  # type: ignore[dict-item]
    # Each looks into every installed package, only to find versions of those that are hidden.
    importlib.metadata.packages_distributions = dict
    logging.getLogger("transformers").addFilter(lambda record: "PyTorch" not in record.msg)


def _run_command(words: list[str], debug: bool) -> int:
    """Import and run a command."""
    name, argv = words[0], words[1:]
    _refuse_other(name, COMMANDS, "command", "pacatune")
    if name in ("train", "estimate"):
        require_extra(f"`pacatune {name}`", "train")
    # Imported by PEFT where it is installed; says that it lacks kernels nobody here asked for.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    # Deprecations between the packages that we build on.
    for package in ("transformers", "trl", "peft", "accelerate", "datasets", "torch"):
        warnings.filterwarnings("ignore", category=FutureWarning, module=rf"{package}\b")
    module = importlib.import_module(f"pacatune.cli.{name}")
    if name == "train":  # which starts itself again, on each GPU
        return int(module.run(argv, [*["--debug"] * debug, *words]))
    if not hasattr(module, "SUBCOMMANDS"):
        command = module.command
    elif not argv or argv[0] in ("-h", "--help"):
        texts = {key: kind.__doc__.splitlines()[0] for key, kind in module.SUBCOMMANDS.items()}
        print(_usage(f"{name} COMMAND", texts, module.DESCRIPTION))
        return 0 if argv else EXIT_USER_ERROR
    else:
        _refuse_other(argv[0], module.SUBCOMMANDS, f"command of {name}", f"pacatune {name}")
        command, name, argv = module.SUBCOMMANDS[argv[0]], f"{name} {argv[0]}", argv[1:]

    from pacatune.cli.options import from_words

    return int(from_words(name, command, argv).run())


def _refuse_other(name: str, names: Collection[str], kind: str, prog: str) -> None:
    if name not in names:
        kind = "option" if name.startswith("-") else kind
        raise ValueError(
            f"unknown {kind} {name!r}; {did_you_mean(name, names)} See `{prog} --help`."
        )


def _usage(words: str, table: Mapping[str, str], description: str, more: str = "") -> str:
    width = max(map(len, table))
    lines = "\n".join(f"  {name:<{width}}  {text}" for name, text in table.items())
    return (
        f"usage: pacatune {words} [OPTIONS]\n\n{description}\n\ncommands:\n{lines}\n\n{more}"
        f"`pacatune {words.removeprefix('[--debug] ')} --help` lists the options of a command."
    )
