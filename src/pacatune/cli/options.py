"""The parser of every command, and options and habits that commands share."""

import re
import sys
from argparse import ArgumentError
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from inspect import signature
from itertools import takewhile
from pathlib import Path
from types import UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

from jsonargparse import ArgumentParser, Namespace, set_parsing_settings

from pacatune.names import choices_of, choose, spell, suggest
from pacatune.training.config_file import PARSER_MODE

T = TypeVar("T")

# What jsonargparse says of a value: the option, and at its end the value.
_WRONG = re.compile(r'Parser key "([\w.]+)":.*(?:Got|Given) value: (.*)', re.DOTALL)
_KINDS: dict[Any, str] = {
    **{int: "a whole number", float: "a number", bool: "true, false", type(None): "null"},
    **{str: "a text", list: "a list", dict: "a mapping"},
}
_OPTION = re.compile(r"--?[A-Za-z][\w.-]*\+?")

set_parsing_settings(docstring_parse_attribute_docstrings=True)


class SectionParser(ArgumentParser):
    """Parser of options that form sections, `--section.some_name`; its errors are one line."""

    def __init__(self, command: str, description: str, **options: Any) -> None:
        super().__init__(
            prog=f"pacatune {command}",
            description=description,
            exit_on_error=False,
            allow_abbrev=False,
            parser_mode=PARSER_MODE,
            **{"print_config": None, **options},
        )
        self._negative_number_matcher = re.compile(r"-\.?\d")  # argparse knows no -1e-3

    def parse_args(self, args: Any = None, namespace: Any = None, **more: Any) -> Namespace:  # type: ignore[override]
        """Parse the words of the command line; what is wrong with them is a ValueError.

        An unknown option is refused first: without it another one, which was meant, may be missing.
        """
        args = spell(args or ())
        refuse_unknown(args, self._option_string_actions)
        try:
            return super().parse_args(args, namespace, **more)
        except ArgumentError as error:
            raise ValueError(f"{self._told(str(error))}; see `{self.prog} --help`.") from error

    def _told(self, error: str) -> str:
        """Return what is wrong with a value in our words, if that is what the error says."""
        if (match := _WRONG.search(error)) is None:
            return error
        name, value = match.groups()
        kinds = [getattr(a, "_typehint", None) for a in self._actions if a.dest == name]
        if kinds in ([], [None]):
            return error
        *others, last = ", ".join(map(_allowed, kinds)).split(", ")
        allowed = f"{', '.join(others)} or {last}" if others else last
        return f"`{name}` ({value!r}) must be {allowed}"


class CommandParser(SectionParser):
    """Parser of options that are spelt `--some_name`, those for yes or no without a value.

    Several values are one word with commas for a tuple, several words for a list. `build` splits
    the former, and refuses what is no choice.
    """

    def add_argument(self, *names: str, **arguments: Any) -> Any:
        """Add an option by argparse's arguments, of which `type` may be any annotation."""
        kind = getattr(arguments.get("action"), "_typehint", arguments.get("type"))
        kinds, changes = (kind, *get_args(kind)), dict[str, Any]()
        if kind is bool:
            changes = {"action": "store_true"}
        elif choices := choices_of(kind):
            changes = {"type": str, "metavar": f"{{{','.join(choices)}}}"}
        elif "..." in str(kind):
            default = ",".join(map(str, arguments.get("default") or ())) or None
            shown = "A,B,..." if "str" in str(kind) else "N,M,..."
            changes = {"type": str, "metavar": shown, "default": default}
        elif any(str(part).startswith("list") for part in kinds):
            changes = {"type": str, "nargs": "+"}
        if changes:
            kept = ("default", "help", "required")
            arguments = {key: arguments[key] for key in kept if key in arguments} | changes
        spelt = [name.rstrip("_") for name in names if not name.endswith("+")]
        return super().add_argument(*spelt, **arguments)


def _allowed(kind: Any) -> str:
    """Return the values of a type, with commas between."""
    origin = get_origin(kind)
    if origin in (Union, UnionType):
        return ", ".join(map(_allowed, get_args(kind)))
    if origin is Literal:
        return ", ".join(map(str, get_args(kind)))
    return _KINDS.get(origin or kind, str(getattr(kind, "__name__", kind)))


def parser_of(command: str, options: type) -> CommandParser:
    """Return a parser of a command's options, the fields of a dataclass.

    Its docstring is the help. What has no default and may be given by position is a word without
    a name.
    """
    parser = CommandParser(command, " ".join((options.__doc__ or "").split()))
    parser.add_class_arguments(options, as_group=False, as_positional=True)
    return parser


def from_words(command: str, options: type[T], argv: list[str]) -> T:
    """Return the dataclass of a command's options that words say."""
    return build(options, parser_of(command, options).parse_args(argv))


def build(options: type[T], values: Namespace) -> T:
    """Return a dataclass of parsed values."""
    arguments = {}
    for parameter in signature(options).parameters.values():
        name, kind = parameter.name.rstrip("_"), parameter.annotation  # `with_` is --with
        value = values.get(name)
        if value is None:
            continue  # which is the default then
        if "..." in str(kind):
            value = _split(name, value, is_text="str" in str(kind))
        elif choices := choices_of(kind):
            value = choose(value, choices, option=name)
        arguments[parameter.name] = value
    return options(**arguments)


def _split(name: str, text: str, *, is_text: bool) -> tuple[Any, ...]:
    words = [word.strip() for word in text.split(",") if word.strip()]
    if words and (is_text or all(word.lstrip("-").isdecimal() for word in words)):
        return tuple(words if is_text else map(int, words))
    kind = "names" if is_text else "whole numbers"
    raise ValueError(f"`{name}` ({text!r}) must be {kind} with commas between.")


def refuse_unknown(words: Sequence[str], options: Collection[str]) -> None:
    """Refuse words that look like options and are none of those known, nor keys inside of them."""
    for word in takewhile(lambda word: word != "--", words):
        name = word.partition("=")[0]
        if not _OPTION.fullmatch(name) or name in options or name.rstrip("+") in options:
            continue
        # A key inside an option that holds a mapping, such as --paca.rank_pattern.q_proj.
        if not any(name.startswith(f"{option}.") for option in options if "." in option):
            named = [option for option in options if option.startswith("--")]
            raise ValueError(f"unknown option {name}; {suggest(name, named)}")


def give_one(*, needed: bool = False, **options: Any) -> None:
    """Refuse several of some options, and with `needed` none of them."""
    names = [name for name, value in options.items() if value]
    if len(names) > 1 or (needed and not names):
        flags = ", ".join(f"--{name}" for name in options)
        raise ValueError(f"give {'only ' if names else ''}one of {flags}.")


@dataclass(frozen=True, kw_only=True)
class BaseOptions:
    """Options of the commands that take a base model and an adapter."""

    model: str | None = None
    """Folder or hub id of the base; by default the adapter's own."""
    adapter: str | None = None
    """Folder or hub id of the adapter."""
    allow_other_base: bool = False
    """Go on although the base is not the one the adapter was trained on."""

    def values(self, *names: str) -> dict[str, Any]:
        """Return some of the options by name."""
        return {name: getattr(self, name) for name in names}

    def check_base(self, output: str | None = None) -> None:
        """Refuse an output, adapter or base that cannot be; PEFT takes seconds more."""
        from pacatune.adapters.folder import CONFIG_NAME, locate_folder
        from pacatune.files.folder import check_output
        from pacatune.files.plain import find_file
        from pacatune.pretrained import find_model, refuse_absent

        if output is not None:
            check_output(Path(output), num_bytes=0)
        if self.adapter is not None:
            find_file(locate_folder(self.adapter), CONFIG_NAME)
        if self.model is not None and not Path(find_model(self.model, option="model")).exists():
            refuse_absent(self.model, option="model")


@dataclass(frozen=True, kw_only=True)
class ModelOptions(BaseOptions):
    """Options of those that compute with them."""

    device: str = "auto"
    """Device: cpu, cuda, ...; auto takes the accelerator if there is one."""

    def check_base(self, output: str | None = None) -> None:
        """Refuse a device that cannot be as well."""
        from pacatune.precision import choose_device

        super().check_base(output)
        choose_device(self.device)


def quiet_libraries() -> None:
    """Keep progress bars and log lines of other packages out of our output."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def print_notes(notes: Iterable[str]) -> None:
    """Print notes on stderr, so that they never mix with a command's result."""
    for note in notes:
        print(f"note: {note}", file=sys.stderr)
