"""What the evaluations' command lines have in common."""

import argparse
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pacatune.cli.options import add_base_options, new_parser, positive, print_notes
from pacatune.precision import DTYPES
from pacatune.pretrained import QUANTIZATIONS

if TYPE_CHECKING:
    from pacatune.adapters.loading import LoadedModel
    from pacatune.evaluation.output import Report


def model_parser(name: str, description: str) -> argparse.ArgumentParser:
    """Return a parser with the options of the model, of the output and of speed.

    Args:
        name: Of the evaluation.
        description: One sentence for the help text.
    """
    parser = new_parser(f"evaluate {name}", description)
    add_base_options(parser, adapter_required=False, device="auto")
    add = parser.add_argument
    add("--output", metavar="DIR", required=True, help="new folder of the result")
    add("--dtype", choices=DTYPES, default="auto", help="of the base (default: its own)")
    add(
        "--quantization",
        choices=QUANTIZATIONS,
        help="hold the base in fewer bits, as `train --model.quantization`; a PaCA adapter trained "
        "so does it by itself",
    )
    add(
        "--batch-size",
        type=positive,
        default=8,
        help="evaluated at once; more is faster on a GPU (default: %(default)s)",
    )
    return parser


@contextmanager
def loaded_model(options: argparse.Namespace) -> Iterator["LoadedModel"]:
    """Load the model that the options name, and print what there is to know about it.

    It is this command's alone, so adapted columns are kept in its weights.
    """
    from pacatune import resident
    from pacatune.adapters.loading import load_language_model

    loaded = load_language_model(
        options.model,
        options.adapter,
        dtype=options.dtype,
        device=options.device,
        quantization=options.quantization,
        allow_other_base=options.allow_other_base,
    )
    print_notes(loaded.notes)
    with resident(loaded.model):
        yield loaded


def command_line(name: str, argv: list[str]) -> str:
    """Return the command as it was typed."""
    return " ".join(["pacatune evaluate", name, *map(shlex.quote, argv)])


def settings_of(options: argparse.Namespace, *names: str) -> dict[str, Any]:
    """Return the options that decide numbers, with `quantization` and `batch_size`."""
    return {name: getattr(options, name) for name in (*names, "quantization", "batch_size")}


def show(report: "Report", output: Path) -> None:
    """Print a result, and where it is."""
    from rich.console import Console

    console = Console(highlight=False)
    console.print(report.table())
    for note in report.notes:
        console.print(note, style="dim", markup=False)
    console.print(f"wrote {output}", markup=False, soft_wrap=True)


def names(text: str) -> list[str]:
    """Return the names of an option such as `a,b`.

    Raises:
        argparse.ArgumentTypeError: If there is none.
    """
    found = [name.strip() for name in text.split(",") if name.strip()]
    if not found:
        raise argparse.ArgumentTypeError(f"{text!r} names nothing; write a,b,c")
    return found
