"""`pacatune patch WHAT`: adapters as exact edits of checkpoints."""

import argparse
from functools import partial
from typing import TYPE_CHECKING

from pacatune.cli.options import check_base, new_parser, print_notes, quiet_libraries
from pacatune.cli.subcommands import Subcommands, run_subcommand

if TYPE_CHECKING:
    from pacatune.patch import Difference, FolderResult, Patch, PatchDifference

_MOST_ROWS = 12


def run(argv: list[str]) -> int:
    """Run what the first word names with the words after it; return its status."""
    return run_subcommand(
        "patch",
        SUBCOMMANDS,
        argv,
        description="Handle an adapter as an exact edit of a checkpoint: its columns, before and "
        "after.",
        kind="command of patch",
    )


def run_make(argv: list[str]) -> int:
    """Run `pacatune patch make`."""
    parser = new_parser(
        "patch make",
        "Write the patch that turns an adapter's base into the merged model: the trained columns "
        "before and after, in the base's dtype, and the adapter itself.",
    )
    add, base = parser.add_argument, "folder or hub id of the base (default: the adapter's own)"
    add("--model", metavar="BASE", help=base)
    add("--adapter", metavar="DIR", required=True, help="folder or hub id of the PaCA adapter")
    add("--output", metavar="FILE", required=True, help="file to write, such as p.safetensors")
    without = "leave the adapter's own tensors out: smaller, but `to-adapter` needs them"
    add("--no-adapter", action="store_true", help=without)
    other = "go on although the base is not the one the adapter was trained on"
    add("--allow-other-base", action="store_true", help=other)
    options = parser.parse_args(argv)
    check_base(options)
    quiet_libraries()

    from pacatune.files.folder import format_bytes
    from pacatune.patch.adapter import make
    from pacatune.patch.file import refuse_existing, save

    refuse_existing(options.output)
    patch, notes = make(
        options.model,
        options.adapter,
        with_adapter=not options.no_adapter,
        allow_other_base=options.allow_other_base,
    )
    size = save(patch, options.output)
    print(f"base      {patch.base}")
    print(f"columns   {patch.num_columns} of {len(patch.edits)} tensors")
    kept = "" if patch.adapter is None else f", the adapter {format_bytes(patch.adapter.num_bytes)}"
    print(
        f"written   {options.output} ({format_bytes(size)}: columns before and after "
        f"{format_bytes(2 * patch.num_bytes)}{kept})"
    )
    print_notes(notes)
    return 0


def run_apply(argv: list[str], *, revert: bool) -> int:
    """Run `pacatune patch apply`, or `revert`."""
    name, text, folder = "apply", _APPLY, "folder or hub id of the base"
    if revert:
        name, text, folder = "revert", _REVERT, "the patched model's folder"
    parser = new_parser(f"patch {name}", text)
    parser.add_argument("--model", metavar="DIR", required=True, help=folder)
    parser.add_argument("--patch", metavar="FILE", required=True, help="the patch")
    _add_target_options(parser)
    options = parser.parse_args(argv)
    quiet_libraries()

    from pacatune.patch import load

    return _write_folder(options, load(options.patch), revert=revert)


_APPLY = (
    "Write a patch into its base: a plain model folder, the one that `pacatune merge` writes, "
    "without loading the model."
)
_REVERT = "Take a patch out of a model folder again: the base, bit for bit."


def _add_target_options(parser: argparse.ArgumentParser) -> None:
    """Add --output, --in-place and --allow-other-base."""
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--output", metavar="DIR", help="folder to write")
    in_place = "change the folder itself; if that is interrupted, the next one rolls it back"
    where.add_argument("--in-place", action="store_true", help=in_place)
    other = "go on although the base is not the one the patch is for, as long as its columns are"
    parser.add_argument("--allow-other-base", action="store_true", help=other)


def _write_folder(options: argparse.Namespace, patch: "Patch", *, revert: bool) -> int:
    """Write a patched or reverted model as the options say, and print what was done."""
    from pacatune.patch import apply_in_place, apply_to_folder
    from pacatune.patch.base import find_folder

    settings = {"revert": revert, "allow_other_base": options.allow_other_base}
    if options.in_place:
        result = apply_in_place(options.model, patch, **settings)
    else:
        result = apply_to_folder(find_folder(options.model), patch, options.output, **settings)
    _print_folder(result, revert=revert, in_place=options.in_place)
    return 0


def _print_folder(result: "FolderResult", *, revert: bool, in_place: bool) -> None:
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


def run_diff(argv: list[str]) -> int:
    """Run `pacatune patch diff`."""
    parser = new_parser(
        "patch diff",
        "Compare two model folders bit by bit, or two patches. Models that differ in few columns "
        "of each tensor give a patch, whoever trained them.",
    )
    add = parser.add_argument
    first = parser.add_mutually_exclusive_group(required=True)
    first.add_argument("--model", metavar="A", help="the base's folder or hub id")
    first.add_argument("--patch", metavar="FILE", help="or a patch")
    add("--with", metavar="B", dest="other", required=True, help="another of the same kind")
    add("--output", metavar="FILE", help="write the patch from A to B")
    options = parser.parse_args(argv)
    quiet_libraries()

    from pacatune.patch import compare_patches, load

    if options.patch is not None:
        if options.output is not None:
            raise ValueError("`--output` is for two models; `pacatune patch stack` joins patches.")
        _print_patches(compare_patches(load(options.patch), load(options.other)))
        return 0

    from pacatune.files.folder import format_bytes
    from pacatune.patch import diff, save
    from pacatune.patch.base import find_folder
    from pacatune.patch.file import refuse_existing

    if options.output is not None:
        refuse_existing(options.output)
    result = diff(find_folder(options.model), find_folder(options.other, option="with"))
    _print_models(result)
    if options.output is None:
        return 0
    if result.patch is None:
        raise ValueError(
            f"{options.model} and {options.other} give no patch: {result.refusal()}. Nothing was "
            "written."
        )
    size = save(result.patch, options.output)
    print(f"written   {options.output} ({format_bytes(size)})")
    print_notes(["a patch of two models has no adapter in it."])
    return 0


def _print_models(result: "Difference") -> None:
    from pacatune.files.folder import format_bytes

    print(f"equal     {result.num_equal} tensors")
    for title, names in (
        ("only A", result.only_a),
        ("only B", result.only_b),
        ("form", result.other_form),
    ):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            print(f"{title:<9} {names[0]}{more}")
    print(f"changed   {len(result.changed)} tensors")
    for name, share in list(result.changed.items())[:_MOST_ROWS]:
        print(f"  {share:7.2%} of the columns  {name}")
    if len(result.changed) > _MOST_ROWS:
        print(f"  {len(result.changed) - _MOST_ROWS} more tensors")
    if result.patch is None:
        print(f"patch     no: {result.refusal()}")
    else:
        size = format_bytes(2 * result.patch.num_bytes)
        print(f"patch     {result.patch.num_columns} columns, {size} before and after")


def _print_patches(result: "PatchDifference") -> None:
    shared = sum(result.shared_columns.values())
    print(f"only A    {len(result.only_a)} tensors")
    print(f"only B    {len(result.only_b)} tensors")
    print(f"both      {result.num_shared_tensors} tensors, {len(result.differing)} of them differ")
    stacks = "" if shared else "; they stack"
    print(f"overlap   {shared} columns of {len(result.shared_columns)} tensors{stacks}")


def run_stack(argv: list[str]) -> int:
    """Run `pacatune patch stack`."""
    parser = new_parser(
        "patch stack",
        "Join patches of one base. Without --model the result is a patch, --output its file; with "
        "--model it is applied.",
    )
    add, files = parser.add_argument, "patches, the first one first"
    add("--patch", metavar="FILE", nargs="+", required=True, help=files)
    add("--model", metavar="DIR", help="folder or hub id of the base, to apply them to")
    _add_target_options(parser)
    overlap = (
        "where several patches change a column, take the first one's, the last one's, or the sum "
        "of their changes, rounded once; without it such patches are refused"
    )
    add("--overlap", choices=("first", "last", "sum"), help=overlap)
    options = parser.parse_args(argv)
    if options.in_place and options.model is None:
        raise ValueError("`--in-place` needs --model, the folder to change.")
    quiet_libraries()

    from pacatune.files.folder import format_bytes
    from pacatune.patch import load, save, stack
    from pacatune.patch.file import refuse_existing

    if options.model is None:
        refuse_existing(options.output)
    patch = stack([load(path) for path in options.patch], overlap=options.overlap)
    print(
        f"stacked   {len(options.patch)} patches: {patch.num_columns} columns of "
        f"{len(patch.edits)} tensors"
    )
    if options.model is not None:
        return _write_folder(options, patch, revert=False)
    print(f"written   {options.output} ({format_bytes(save(patch, options.output))})")
    print_notes(["a stack carries no adapter; keep the patches if you want theirs back."])
    return 0


def run_to_adapter(argv: list[str]) -> int:
    """Run `pacatune patch to-adapter`."""
    parser = new_parser(
        "patch to-adapter",
        "Write the adapter that a patch was made of: the same configuration and tensors.",
    )
    parser.add_argument("--patch", metavar="FILE", required=True, help="the patch")
    parser.add_argument("--output", metavar="DIR", required=True, help="folder to write")
    options = parser.parse_args(argv)
    quiet_libraries()

    from pacatune.patch import load

    patch = load(options.patch)

    from pacatune.patch import to_adapter

    print(f"written   {to_adapter(patch, options.output)}")
    return 0


def run_recover(argv: list[str]) -> int:
    """Run `pacatune patch recover`."""
    parser = new_parser(
        "patch recover",
        "Bring a model folder back to what it was before an apply or revert in place that was "
        "interrupted, or complete that.",
    )
    parser.add_argument("--model", metavar="DIR", required=True, help="the model folder")
    finish = "complete what was begun instead of rolling it back"
    parser.add_argument("--finish", action="store_true", help=finish)
    options = parser.parse_args(argv)

    from pacatune.patch import recover

    notes = recover(options.model, finish=options.finish)
    print("\n".join(notes) or f"{options.model}: nothing was interrupted here.")
    return 0


SUBCOMMANDS: Subcommands = {
    "make": (run_make, "write the patch of an adapter and its base"),
    "apply": (
        partial(run_apply, revert=False),
        "write the patched model: a new folder, or in place",
    ),
    "revert": (partial(run_apply, revert=True), "give the base back, bit for bit"),
    "diff": (run_diff, "say what two model folders or patches differ in; write that as a patch"),
    "stack": (run_stack, "join several patches into one, or apply them together"),
    "to-adapter": (run_to_adapter, "give back the adapter that a patch was made of"),
    "recover": (run_recover, "put a folder in order whose patching in place was interrupted"),
}
