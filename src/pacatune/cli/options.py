"""Options and habits that commands share."""

import argparse
import re
import shlex
import shutil
import sys
from collections.abc import Iterable, Sequence
from itertools import takewhile
from pathlib import Path
from typing import NoReturn

from pacatune.names import did_you_mean, nearest

_OPTION = re.compile(r"--?[A-Za-z][\w-]*")
_CHOICE = re.compile(r"argument ([^:]+): invalid choice: '?(.+?)'? \(choose from (.+)\)")


class CommandParser(argparse.ArgumentParser):
    """Parser of a command whose errors are one line that names what was meant."""

    def parse_args(self, args: Sequence[str], namespace: None = None) -> argparse.Namespace:  # type: ignore[override]
        """Parse the words of the command line.

        Raises:
            ValueError: If one is wrong. An unknown option comes first: without it another one,
                which was meant, may be missing.
        """
        known = self._option_string_actions
        for word in takewhile(lambda word: word != "--", args):
            name = word.partition("=")[0]
            if _OPTION.fullmatch(name) and name not in known:
                hint = did_you_mean(name, [option for option in known if option.startswith("--")])
                self.error(f"unknown option {name}; {hint}".rstrip("."))
        return super().parse_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        """Refuse the words of the command line.

        Raises:
            ValueError: Says what is wrong with them.
        """
        choice = _CHOICE.fullmatch(message)
        if choice is not None:
            choices = [name.strip("'") for name in choice[3].split(", ")]
            near = nearest(choice[2], choices)
            message = f"`{choice[1]}` ({choice[2]!r}) must be one of {', '.join(choices)}"
            message += "" if near is None else f"; did you mean {near!r}?"
        see = " See" if message.endswith("?") else "; see"
        raise ValueError(f"{message}{see} `{self.prog} --help`.")


def new_parser(command: str, description: str) -> CommandParser:
    """Return the parser of one command.

    Args:
        command: Its name.
        description: One sentence for the help text.
    """
    return CommandParser(prog=f"pacatune {command}", description=description, allow_abbrev=False)


def add_base_options(
    parser: argparse.ArgumentParser, *, adapter_required: bool, device: str
) -> None:
    """Add --model, --adapter, --device and --allow-other-base.

    Args:
        parser: Gets the options.
        adapter_required: Whether the command makes sense without an adapter.
        device: Default of --device.
    """
    parser.add_argument(
        "--model", metavar="BASE", help="folder or hub id of the base (default: the adapter's own)"
    )
    parser.add_argument(
        "--adapter",
        metavar="DIR",
        required=adapter_required,
        help="folder or hub id of the adapter",
    )
    parser.add_argument(
        "--device",
        default=device,
        help="cpu, cuda, ...; auto takes the accelerator if there is one (default: %(default)s)",
    )
    parser.add_argument(
        "--allow-other-base",
        action="store_true",
        help="go on although the base is not the one the adapter was trained on",
    )


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
    """Return the number of an option.

    Raises:
        argparse.ArgumentTypeError: If it is none of at least 1.
    """
    number = int(text) if text.isdecimal() else 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of at least 1")
    return number


def names(text: str) -> list[str]:
    """Return the names of an option such as `a,b`.

    Raises:
        argparse.ArgumentTypeError: If there is none.
    """
    found = [name.strip() for name in text.split(",") if name.strip()]
    if not found:
        raise argparse.ArgumentTypeError(f"{text!r} names nothing; write a,b,c")
    return found


def program_name() -> str:
    """Return how this very installation is called from here."""
    script = Path(sys.executable).with_name("pacatune")
    if not script.exists():
        return f"{shlex.quote(sys.executable)} -m pacatune"
    found = shutil.which("pacatune")
    if found is not None and Path(found).resolve() == script.resolve():
        return "pacatune"
    here = Path.cwd()
    return shlex.quote(str(script.relative_to(here) if script.is_relative_to(here) else script))
