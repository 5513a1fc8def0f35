"""Commands of two words, such as `pacatune evaluate mmlu`."""

import importlib
from collections.abc import Mapping

from pacatune.names import did_you_mean


def run_subcommand(
    command: str,
    subcommands: Mapping[str, str],
    argv: list[str],
    *,
    description: str,
    word: str,
    kind: str,
) -> int:
    """Run what the first word names with the words after it; return the exit status.

    Each is the module `pacatune.cli.COMMAND_NAME` (`-` as `_`) with `run(argv: list[str]) -> int`.

    Args:
        command: The first of the two words.
        subcommands: Name -> what it does.
        argv: The words after `command`.
        description: What the command does, for its help.
        word: What the help calls the second word.
        kind: What messages call it.
    """
    if not argv or argv[0] in ("-h", "--help"):
        print(_usage(command, subcommands, description, word))
        return 0 if argv else 2
    name = argv[0]
    if name not in subcommands:
        kind = "option" if name.startswith("-") else kind
        hint = did_you_mean(name, subcommands)
        raise ValueError(f"unknown {kind} {name!r}; {hint} See `pacatune {command} --help`.")
    module = importlib.import_module(f"pacatune.cli.{command}_{name.replace('-', '_')}")
    status: int = module.run(argv[1:])
    return status


def _usage(command: str, subcommands: Mapping[str, str], description: str, word: str) -> str:
    width = max(map(len, subcommands))
    table = "\n".join(f"  {name:<{width}}  {text}" for name, text in subcommands.items())
    return (
        f"usage: pacatune {command} {word.upper()} [OPTIONS]\n\n"
        f"{description}\n\n"
        f"{word}:\n{table}\n\n"
        f"`pacatune {command} {word.upper()} --help` lists the options of one."
    )
