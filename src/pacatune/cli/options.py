"""Options and habits that commands share."""

import argparse
import ast
import inspect
import re
import sys
import textwrap
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import MISSING, Field, fields
from itertools import takewhile
from pathlib import Path
from typing import Any, NoReturn, get_args

from pacatune.names import choices_of, did_you_mean, nearest

_OPTION = re.compile(r"--?[A-Za-z][\w-]*")
_CHOICE = re.compile(r"argument ([^:]+): invalid choice: '?(.+?)'? \(choose from (.+)\)")


class CommandParser(argparse.ArgumentParser):
    """Parser of a command whose errors are one line that names what was meant."""

    def parse_args(self, args: Sequence[str], namespace: None = None) -> argparse.Namespace:  # type: ignore[override]
        """Parse the words of the command line; an unknown option is refused first.

        Without it another one, which was meant, may be missing.
        """
        if list(args) == [_WHICH_PARSER]:
            raise _ParserFound(self)
        known = self._option_string_actions
        for word in takewhile(lambda word: word != "--", args):
            name = word.partition("=")[0]
            if _OPTION.fullmatch(name) and name not in known:
                hint = did_you_mean(name, [option for option in known if option.startswith("--")])
                self.error(f"unknown option {name}; {hint}".rstrip("."))
        return super().parse_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        """Refuse the words of the command line by a ValueError, which the entry shows."""
        choice = _CHOICE.fullmatch(message)
        if choice is not None:
            choices = [name.strip("'") for name in choice[3].split(", ")]
            near = nearest(choice[2], choices)
            message = f"`{choice[1]}` ({choice[2]!r}) must be one of {', '.join(choices)}"
            message += "" if near is None else f"; did you mean {near!r}?"
        see = " See" if message.endswith("?") else "; see"
        raise ValueError(f"{message}{see} `{self.prog} --help`.")


class _ParserFound(Exception):
    def __init__(self, parser: CommandParser) -> None:
        self.parser = parser


_WHICH_PARSER = "\0parser"


def find_parser(run: Callable[[list[str]], int]) -> CommandParser:
    """Return the parser of a command, which goes no further than to make it."""
    try:
        run([_WHICH_PARSER])
    except _ParserFound as found:
        return found.parser
    raise AssertionError(f"{run} parsed no options")


def new_parser(command: str, description: str) -> CommandParser:
    """Return the parser of one command, which a sentence describes."""
    return CommandParser(prog=f"pacatune {command}", description=description, allow_abbrev=False)


def add_base_options(
    parser: argparse.ArgumentParser, *, adapter_required: bool, device: str
) -> None:
    """Add --model, --adapter, --device (by default `device`) and --allow-other-base."""
    add, adapter = parser.add_argument, "folder or hub id of the adapter"
    add("--model", metavar="BASE", help="folder or hub id of the base (default: the adapter's own)")
    add("--adapter", metavar="DIR", required=adapter_required, help=adapter)
    where = "cpu, cuda, ...; auto takes the accelerator if there is one (default: %(default)s)"
    add("--device", default=device, help=where)
    other = "go on although the base is not the one the adapter was trained on"
    add("--allow-other-base", action="store_true", help=other)


def check_base(options: argparse.Namespace, output: str | None = None) -> None:
    """Refuse an output folder, adapter, base or device that cannot be; PEFT takes seconds more."""
    from pacatune.adapters.folder import CONFIG_NAME, locate_folder
    from pacatune.files.folder import check_output
    from pacatune.files.plain import find_file
    from pacatune.precision import choose_device
    from pacatune.pretrained import find_model

    if output is not None:
        check_output(Path(output), num_bytes=0)
    if options.adapter is not None:
        find_file(locate_folder(options.adapter), CONFIG_NAME)
    if options.model is not None:
        find_model(options.model, option="model")
    choose_device(getattr(options, "device", "auto"))


def add_fields(
    parser: argparse.ArgumentParser, kind: Any, *, skip: Collection[str] = (), **changes: Any
) -> None:
    """Add an option for each field of a dataclass but `skip`: its name, default and docstring.

    Values keep to the dataclass's own checks, whose messages are one line; only what is no number
    where a number belongs ends here. A tuple stays text until `field_values` reads it. `changes`
    are, by field, arguments of `add_argument` that are other than the field says.
    """
    helps = field_helps(kind)
    for field in fields(kind):
        if field.name not in skip:
            arguments = _arguments(field, helps.get(field.name, "")) | changes.get(field.name, {})
            parser.add_argument(f"--{field.name.replace('_', '-')}", **arguments)


def _arguments(field: "Field[Any]", text: str) -> dict[str, Any]:
    default = None if field.default is MISSING else field.default
    if field.type is bool:
        return {"action": "store_true", "help": text}
    is_required = field.default is MISSING and field.default_factory is MISSING
    if isinstance(default, tuple):
        default = ",".join(map(str, default)) or None
    if default is not None:
        text += " (default: %(default)s)"
    arguments: dict[str, Any] = {"default": default, "help": text, "required": is_required}
    kinds = (field.type, *get_args(field.type))
    if choices := choices_of(field.type):
        return arguments | {"metavar": f"{{{','.join(choices)}}}"}
    if "..." in str(field.type):
        return arguments | {"metavar": "A,B,..." if str in kinds else "N,M,..."}
    if Path in kinds:
        return arguments | {"metavar": "PATH"}
    number = next((kind for kind in (int, float) if kind in kinds), None)
    return arguments | ({"metavar": "NAME"} if number is None else {"type": number, "metavar": "N"})


def field_values(options: argparse.Namespace, kind: Any) -> dict[str, Any]:
    """Return the options that are fields of a dataclass, as its constructor takes them."""
    return {
        field.name: _value(field, getattr(options, field.name))
        for field in fields(kind)
        if hasattr(options, field.name)
    }


def _value(field: "Field[Any]", value: Any) -> Any:
    if Path in (field.type, *get_args(field.type)):
        return None if value is None else Path(value)
    if "..." not in str(field.type) or isinstance(value, tuple):
        return value
    words = [word.strip() for word in (value or "").split(",")]
    if int not in get_args(field.type):
        return tuple(filter(None, words))
    try:
        return tuple(map(int, words))
    except ValueError:
        raise ValueError(
            f"`{field.name}` ({value!r}) must be whole numbers with commas between, such as 16,512."
        ) from None


def field_helps(kind: Any) -> dict[str, str]:
    """Return the docstring under each field of a dataclass as help; none without its source."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(kind)))
    except OSError:
        return {}
    (owner,) = (node for node in tree.body if isinstance(node, ast.ClassDef))
    helps = {}
    for node, after in zip(owner.body, owner.body[1:], strict=False):
        if isinstance(node, ast.AnnAssign) and isinstance(after, ast.Expr):
            text = " ".join(str(ast.literal_eval(after.value)).split()).rstrip(".")
            helps[ast.unparse(node.target)] = (text[:1].lower() + text[1:]).replace("%", "%%")
    return helps


def names(text: str) -> list[str]:
    """Return the names of an option such as `a,b`."""
    found = [name.strip() for name in text.split(",") if name.strip()]
    if not found:
        raise argparse.ArgumentTypeError(f"{text!r} names nothing; write a,b,c")
    return found


def quiet_libraries() -> None:
    """Keep progress bars and log lines of other packages out of our output."""
    import logging

    from transformers.utils import logging as transformers_logging

    # Imported by PEFT where it is installed; says that it lacks kernels nobody here asked for.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()


def print_notes(notes: Iterable[str]) -> None:
    """Print notes on stderr, so that they never mix with a command's result."""
    for note in notes:
        print(f"note: {note}", file=sys.stderr)


def positive(text: str) -> int:
    """Return the number of an option, at least 1."""
    number = int(text) if text.isdecimal() else 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of at least 1")
    return number
