"""`pacatune patch diff`: what two model folders, or two patches, differ in."""

from typing import TYPE_CHECKING

from pacatune.cli.options import new_parser, print_notes, quiet_libraries

if TYPE_CHECKING:
    from pacatune.patch import Difference, PatchDifference

_MOST_ROWS = 12


def run(argv: list[str]) -> int:
    """Run `pacatune patch diff` with the words after it; return the exit status."""
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
    why = result.refusal()
    print("patch     " + (f"no: {why}" if why is not None else _describe(result)))


def _describe(result: "Difference") -> str:
    from pacatune.files.folder import format_bytes

    assert result.patch is not None
    size = format_bytes(2 * result.patch.num_bytes)
    return f"{result.patch.num_columns} columns, {size} before and after"


def _print_patches(result: "PatchDifference") -> None:
    shared = sum(result.shared_columns.values())
    print(f"only A    {len(result.only_a)} tensors")
    print(f"only B    {len(result.only_b)} tensors")
    print(f"both      {result.num_shared_tensors} tensors, {len(result.differing)} of them differ")
    stacks = "" if shared else "; they stack"
    print(f"overlap   {shared} columns of {len(result.shared_columns)} tensors{stacks}")
