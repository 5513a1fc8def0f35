"""Commands of two words, such as `pacatune evaluate mmlu`."""

from collections.abc import Callable, Mapping

from pacatune.names import did_you_mean

Subcommands = Mapping[str, tuple[Callable[[list[str]], int], str]]
"""Second word -> what runs the words after it and returns the exit status, and what it does."""


def run_subcommand(
    command: str, subcommands: Subcommands, argv: list[str], *, description: str, kind: str
) -> int:
    """Run what the second word names; `kind` is what messages call it."""
    if not argv or argv[0] in ("-h", "--help"):
        print(_usage(command, subcommands, description))
        return 0 if argv else 2
    name = argv[0]
    if name not in subcommands:
        kind = "option" if name.startswith("-") else kind
        hint = did_you_mean(name, subcommands)
        raise ValueError(f"unknown {kind} {name!r}; {hint} See `pacatune {command} --help`.")
    return subcommands[name][0](argv[1:])


def _usage(command: str, subcommands: Subcommands, description: str) -> str:
    width = max(map(len, subcommands))
    table = "\n".join(f"  {name:<{width}}  {text}" for name, (_, text) in subcommands.items())
    return (
        f"usage: pacatune {command} WHAT [OPTIONS]\n\n"
        f"{description}\n\n"
        f"what:\n{table}\n\n"
        f"`pacatune {command} WHAT --help` lists the options of one."
    )
