"""`pacatune patch WHAT`: adapters as exact edits of checkpoints, and what their commands share."""

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING

from pacatune.cli.options import new_parser, print_notes, quiet_libraries
from pacatune.cli.subcommands import run_subcommand

if TYPE_CHECKING:
    from pacatune.patch import FolderResult, Patch

SUBCOMMANDS = {
    "make": "write the patch of an adapter and its base",
    "apply": "write the patched model as a new folder, or in place",
    "revert": "give the base back, bit for bit",
    "diff": "say what two model folders or two patches differ in, and write that as a patch",
    "stack": "join several patches into one, or apply them together",
    "to-adapter": "give back the adapter that a patch was made of",
    "recover": "put a folder in order whose patching in place was interrupted",
}


def run(argv: list[str]) -> int:
    """Run what the first word names with the words after it; return its status."""
    return run_subcommand(
        "patch",
        SUBCOMMANDS,
        argv,
        description="Handle an adapter as an exact edit of a checkpoint: its columns, before and "
        "after.",
        word="what",
        kind="command of patch",
    )


def add_target_options(parser: argparse.ArgumentParser, *, required: bool = True) -> None:
    """Add --output, --in-place and --allow-other-base."""
    where = parser.add_mutually_exclusive_group(required=required)
    where.add_argument("--output", metavar="DIR", help="folder to write")
    in_place = "change the folder itself; if that is interrupted, the next one rolls it back"
    where.add_argument("--in-place", action="store_true", help=in_place)
    other = "go on although the base is not the one the patch is for, as long as its columns are"
    parser.add_argument("--allow-other-base", action="store_true", help=other)


def write_folder(options: argparse.Namespace, patch: "Patch", *, revert: bool) -> int:
    """Write a patched or reverted model as the options say, and print what was done."""
    from pacatune.patch import apply_in_place, apply_to_folder
    from pacatune.patch.base import find_folder

    settings = {"revert": revert, "allow_other_base": options.allow_other_base}
    if options.in_place:
        result = apply_in_place(options.model, patch, **settings)
    else:
        result = apply_to_folder(find_folder(options.model), patch, options.output, **settings)
    _print_result(result, revert=revert, in_place=options.in_place)
    return 0


def _print_result(result: "FolderResult", *, revert: bool, in_place: bool) -> None:
    from pacatune.files.folder import format_bytes

    done = "reverted" if revert else "applied"
    size = format_bytes(result.checkpoint_bytes)
    print(
        f"{done:<9} {result.num_columns} columns of {result.num_tensors} tensors: "
        f"{format_bytes(result.column_bytes)} of {size}, in disk pages of "
        f"{format_bytes(result.page_bytes)}"
    )
    print("verified  the columns before, bit for bit" + ("" if in_place else ", and those written"))
    print(f"written   {result.folder}" + (" (in place)" if in_place else f" ({size})"))
    print_notes(result.notes)


def run_apply(argv: Sequence[str], *, revert: bool) -> int:
    """Run `pacatune patch apply`, or `revert`."""
    name = "revert" if revert else "apply"
    texts = {
        "apply": "Write a patch into its base: a plain model folder, the one that `pacatune merge` "
        "writes, without loading the model.",
        "revert": "Take a patch out of a model folder again: the base, bit for bit.",
    }
    parser = new_parser(f"patch {name}", texts[name])
    folder = "the patched model's folder" if revert else "folder or hub id of the base"
    parser.add_argument("--model", metavar="DIR", required=True, help=folder)
    parser.add_argument("--patch", metavar="FILE", required=True, help="the patch")
    add_target_options(parser)
    options = parser.parse_args(argv)
    quiet_libraries()

    from pacatune.patch import load

    return write_folder(options, load(options.patch), revert=revert)
