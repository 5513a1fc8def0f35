"""Options and habits that commands share."""

import argparse
import shlex
import shutil
import sys
from collections.abc import Iterable
from pathlib import Path


def new_parser(command: str, description: str) -> argparse.ArgumentParser:
    """Return the parser of one command.

    Args:
        command: Its name.
        description: One sentence for the help text.
    """
    return argparse.ArgumentParser(
        prog=f"pacatune {command}",
        description=description,
        allow_abbrev=False,
    )


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
