"""`pacatune patch to-adapter`: give back the adapter that a patch was made of."""

from pacatune.cli.options import new_parser, quiet_libraries


def run(argv: list[str]) -> int:
    """Run `pacatune patch to-adapter` with the words after it; return the exit status."""
    parser = new_parser(
        "patch to-adapter",
        "Write the adapter that a patch was made of: the same configuration and tensors.",
    )
    parser.add_argument("--patch", metavar="FILE", required=True, help="the patch")
    parser.add_argument("--output", metavar="DIR", required=True, help="folder to write")
    options = parser.parse_args(argv)
    quiet_libraries()

    from pacatune.patch.adapter import to_adapter
    from pacatune.patch.file import load

    print(f"written   {to_adapter(load(options.patch), options.output)}")
    return 0
