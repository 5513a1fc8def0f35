"""`pacatune completion`: print a script by which a shell completes commands and options."""

import importlib
import re
from argparse import _SubParsersAction
from collections.abc import Callable
from typing import Literal

from jsonargparse import ArgumentParser, capture_parser

from pacatune.cli.options import parser_of


def command(shell: Literal["bash", "zsh", "fish"]) -> int:
    """Print a script by which a shell completes commands and options.

    Args:
        shell: Write it where this shell looks for completions, since it takes seconds.
    """
    print(make_parser().get_completion_script(f"shtab-{shell}"))
    return 0


def make_parser() -> ArgumentParser:
    """Return one parser of all commands."""
    from pacatune.cli.entry import COMMANDS, texts_of

    parser = ArgumentParser("pacatune")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    commands = parser.add_subcommands(required=False)
    for name, text in COMMANDS.items():
        module = importlib.import_module(f"pacatune.cli.{name.replace('-', '_')}")
        if hasattr(module, "SUBCOMMANDS"):
            inner = ArgumentParser()
            commands.add_subcommand(name, inner, help=text)
            words = inner.add_subcommands(required=False)
            for word, what in texts_of(module.SUBCOMMANDS).items():
                words.add_subcommand(word, parser_of(word, module.SUBCOMMANDS[word]), help=what)
            continue
        if name == "train":
            inner = _parser_of_tasks(module.run)
        elif hasattr(module, "command"):
            inner = parser_of(name, module.command)
        else:
            inner = capture_parser(module.run, [])
        commands.add_subcommand(name, inner, help=text)
    _say_what_follows(parser)
    return parser


def _parser_of_tasks(run_train: Callable[[list[str]], int]) -> ArgumentParser:
    """Return the parser of `train` with the options of all its tasks."""
    from pacatune.cli.train import names_of_tasks
    from pacatune.methods import METHODS

    parsers = [capture_parser(run_train, ["--task", task]) for task in names_of_tasks()]
    known = {action.dest: action for one in reversed(parsers) for action in one._actions}
    known["task"].choices, known["method"].choices = names_of_tasks(), list(METHODS)
    parsers[0]._actions[:] = known.values()
    return parsers[0]


def _say_what_follows(parser: ArgumentParser) -> None:
    """Have choices completed that the help shows as {a,b}, and files where any text may follow."""
    import shtab

    for action in parser._actions:
        if isinstance(action, _SubParsersAction):
            for inner in action.choices.values():
                _say_what_follows(inner)
        elif shown := re.fullmatch(r"\{(.+)\}", str(action.metavar)):
            action.choices = shown[1].split(",")
        elif not action.choices and "str" in str(getattr(action, "_typehint", action.type)):
            action.complete = shtab.FILE  # type: ignore[attr-defined]
