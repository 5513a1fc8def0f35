"""`pacatune patch recover`: put a folder in order whose patching in place was interrupted."""

from pacatune.cli.options import new_parser


def run(argv: list[str]) -> int:
    """Run `pacatune patch recover` with the words after it; return the exit status."""
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
