"""What the commands that evaluate a model have in common: options, and the way to the result."""

import argparse
import shlex
from collections.abc import Callable, Iterable, Iterator
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
        name: Name of the evaluation.
        description: One sentence for the help text.
    """
    parser = new_parser(f"evaluate {name}", description)
    add_base_options(parser, adapter_required=False, device="auto")
    add = parser.add_argument
    add("--output", metavar="DIR", required=True, help="new folder of the result")
    add(
        "--dtype", choices=DTYPES, default="auto", help="number type of the base (default: its own)"
    )
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


def evaluate(
    name: str,
    argv: list[str],
    options: argparse.Namespace,
    settings: dict[str, Any],
    score: Callable[["LoadedModel"], Iterable["Report"]],
) -> int:
    """Load the model, write and print what it scores; return the exit status.

    Args:
        name: Name of the evaluation.
        argv: Words after the name.
        options: The same, parsed.
        settings: What decides the numbers, beside quantisation and batch size.
        score: Yields the report, again with every further part that is known.
    """
    from rich.console import Console

    from pacatune.evaluation.output import describe, write_report

    output = Path(options.output)
    command = " ".join(["pacatune evaluate", name, *map(shlex.quote, argv)])
    settings = {**settings, **values_of(options, "quantization", "batch_size")}
    with _loaded_model(options) as loaded:
        head = describe(loaded, command, settings)
        for report in score(loaded):
            write_report(output, head, report, finished=False)
        write_report(output, head, report, finished=True)
    console = Console(highlight=False)
    console.print(report.table())
    for note in report.notes:
        console.print(note, style="dim", markup=False)
    console.print(f"wrote {output}", markup=False, soft_wrap=True)
    return 0


@contextmanager
def _loaded_model(options: argparse.Namespace) -> Iterator["LoadedModel"]:
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


def values_of(options: argparse.Namespace, *names: str) -> dict[str, Any]:
    """Return some of the options by name."""
    return {name: getattr(options, name) for name in names}
