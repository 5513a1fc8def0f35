"""`pacatune patch stack`: join several patches, or apply them together."""

from pacatune.cli.options import new_parser, print_notes, quiet_libraries
from pacatune.cli.patch import add_target_options, write_folder


def run(argv: list[str]) -> int:
    """Run `pacatune patch stack` with the words after it; return the exit status."""
    parser = new_parser(
        "patch stack",
        "Join patches of one base. Without --model the result is a patch, --output its file; with "
        "--model it is applied.",
    )
    add, files = parser.add_argument, "patches, the first one first"
    add("--patch", metavar="FILE", nargs="+", required=True, help=files)
    add("--model", metavar="DIR", help="folder or hub id of the base, to apply them to")
    add_target_options(parser)
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
        return write_folder(options, patch, revert=False)
    print(f"written   {options.output} ({format_bytes(save(patch, options.output))})")
    print_notes(["a stack carries no adapter; keep the patches if you want theirs back."])
    return 0
