"""`pacatune patch make`: write the patch of an adapter and its base."""

from pacatune.cli.options import new_parser, print_notes, quiet_libraries


def run(argv: list[str]) -> int:
    """Run `pacatune patch make` with the words after it; return the exit status."""
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
