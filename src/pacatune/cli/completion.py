"""`pacatune completion`: print a script by which a shell completes commands and options.

shtab writes it from one parser of all commands. `train`'s options come from the source of their
classes (`option_names`), since its own parser takes seconds to make. A shell runs `pacatune` once,
for the script.
"""

import argparse
import ast
import importlib
import re
from collections.abc import Callable
from typing import Any

from pacatune.cli.options import find_parser, new_parser, positive

_SHELLS = ("bash", "zsh", "fish")


def run(argv: list[str]) -> int:
    """Run `pacatune completion` with the words after it; return the exit status."""
    parser = new_parser(
        "completion", "Print a script by which a shell completes commands and options."
    )
    where = 'bash and zsh: eval "$(pacatune completion bash)"; fish: pipe it into source'
    parser.add_argument("shell", metavar="SHELL", choices=_SHELLS, help=where)
    shell = parser.parse_args(argv).shell
    print(script(shell))
    return 0


def script(shell: str) -> str:
    """Return the completion script of a shell."""
    import shtab

    parser = make_parser()
    _say_what_follows(parser, shtab.FILE)
    return str(shtab.complete(parser, shell))


def make_parser() -> argparse.ArgumentParser:
    """Return one parser of all commands."""
    from pacatune.cli.entry import COMMANDS

    parser = argparse.ArgumentParser("pacatune")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parser.add_argument("--version", action="store_true", help="show the version")
    commands = parser.add_subparsers()
    for name, text in COMMANDS.items():
        if name in ("train", "train-image"):
            _add_run(commands.add_parser(name, help=text), name)
            continue
        module = importlib.import_module(f"pacatune.cli.{name.replace('-', '_')}")
        subcommands = getattr(module, "SUBCOMMANDS", None)
        if subcommands is None:
            _add(commands, name, text, module.run)
            continue
        words = commands.add_parser(name, help=text).add_subparsers()
        for word, (run_it, what) in subcommands.items():
            _add(words, word, what, run_it)
    return parser


def _add(commands: Any, name: str, text: str, run_it: Callable[[list[str]], int]) -> None:
    commands.add_parser(name, help=text, parents=[find_parser(run_it)], add_help=False)


def _add_run(parser: argparse.ArgumentParser, name: str) -> None:
    """Add the options of `train`, for all its tasks, or of `train-image`."""
    from pacatune.cli.option_names import option_annotations
    from pacatune.cli.run_options import FLAGS
    from pacatune.methods import CLASSIFIER_METHODS, TEXT_METHODS
    from pacatune.training.tasks import TASKS

    module = importlib.import_module(f"pacatune.cli.{name.replace('-', '_')}")
    for flag, arguments in {**FLAGS, **module.FLAGS}.items():
        action = "store_true" if arguments.get("action") == "store_true" else "store"
        add = parser.add_argument(f"--{flag}", action=action, help=arguments["help"])
        add.type = float if arguments.get("metavar") == "N" else None
    classes = TASKS.values() if name == "train" else [module.RUN_CLASS]
    methods = TEXT_METHODS if name == "train" else CLASSIFIER_METHODS
    known = {"method": methods, "task": tuple(TASKS)}
    found: dict[str, str] = {}
    for path in classes:
        found |= option_annotations(*path.rsplit(".", 1))
    sections = {option.partition(".")[0] for option in found if "." in option}
    for option, annotation in found.items():
        if option not in sections:
            choices = known.get(option) or _choices_written(annotation)
            kind = float if _names(annotation) <= {"int", "float"} else str
            parser.add_argument(f"--{option}", choices=choices or None, type=kind)


def _choices_written(annotation: str) -> tuple[str, ...]:
    """Return the values of an annotation that is only choices, as source has it."""
    found = [
        choice
        for node in ast.walk(ast.parse(annotation, mode="eval"))
        if isinstance(node, ast.Subscript) and ast.unparse(node.value) == "Literal"
        for choice in ast.literal_eval(f"[{ast.unparse(node.slice).strip('()')}]")
    ]
    return tuple(map(str, found)) or (("true", "false") if _names(annotation) == {"bool"} else ())


def _names(annotation: str) -> set[str]:
    return set(re.findall(r"\w+", annotation)) - {"None", "Optional"}


def _say_what_follows(parser: argparse.ArgumentParser, file: Any) -> None:
    """Have files completed wherever neither choices nor a number nor nothing is expected."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for inner in action.choices.values():
                _say_what_follows(inner, file)
            continue
        # An option of `add_fields` shows its choices as {a,b}.
        if shown := re.fullmatch(r"\{(.+)\}", str(action.metavar)):
            action.choices = shown[1].split(",")
        if not (action.choices or action.nargs == 0 or action.type in (int, float, positive)):
            action.complete = file  # type: ignore[attr-defined]
