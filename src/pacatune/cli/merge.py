"""`pacatune merge`: write an adapter into its base model, a plain model folder."""

import argparse
from typing import TYPE_CHECKING

from pacatune.cli.options import (
    add_base_options,
    check_base,
    new_parser,
    print_notes,
    quiet_libraries,
)
from pacatune.names import full_name
from pacatune.precision import DTYPES

if TYPE_CHECKING:
    from pacatune.adapters.merge import MergeResult


def run(argv: list[str]) -> int:
    """Run `pacatune merge` with the words after it; return the exit status."""
    options = _parse(argv)
    check_base(options, options.output)
    quiet_libraries()

    from pacatune.adapters.merge import merge

    result = merge(
        options.model,
        options.adapter,
        options.output,
        dtype=options.dtype,
        device=options.device,
        verify=not options.no_verify,
        allow_other_base=options.allow_other_base,
        onto=options.base,
    )
    _print_result(result)
    return 0


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = new_parser(
        "merge", "Write an adapter into its base model: a folder that transformers loads alone."
    )
    add_base_options(parser, adapter_required=True, device="cpu")
    add = parser.add_argument
    add("--output", metavar="DIR", required=True, help="folder to write")
    dtype = "number type of the result (default: the base's own)"
    add("--dtype", type=full_name, choices=DTYPES, default="auto", help=dtype)
    add(
        "--base",
        choices=("original", "dequantized", "nf4"),
        help="for adapters of a quantised base, whose weights the untrained ones are: those of the "
        "checkpoint before quantisation, those that were trained with (the default), or these "
        "quantised again, which costs accuracy",
    )
    skip = "skip comparing outputs before and after (saves four forward passes and a load)"
    add("--no-verify", action="store_true", help=skip)
    return parser.parse_args(argv)


def _print_result(result: "MergeResult") -> None:
    from pacatune.files.folder import format_bytes

    print(f"base      {result.base}" + (f" ({result.onto})" if result.onto != "original" else ""))
    print(f"merged    {result.num_modules} modules, {result.dtype}")
    if result.error is None:
        print("verified  no (--no-verify)")
    else:
        print(f"verified  outputs are those of the adapter, {_rounding(result)}")
    print(f"written   {result.output} ({format_bytes(result.num_bytes)})")
    print_notes(result.notes)


def _rounding(result: "MergeResult") -> str:
    assert result.error is not None
    if result.error.max_absolute == 0:
        return f"which changes them by {result.effect:.1e}"
    return (
        f"rounded by {result.error.max_absolute:.1e} ({result.error.max_relative:.1e} of their "
        f"size; {result.limit:.1e} is allowed); it changes them by {result.effect:.1e}"
    )
