"""`pacatune evaluate mmlu-data`: MMLU as a local folder of tasks."""

from pathlib import Path

from pacatune.cli.options import new_parser, print_notes


def run(argv: list[str]) -> int:
    """Run `pacatune evaluate mmlu-data` with the words after it; return the exit status."""
    parser = new_parser(
        "evaluate mmlu-data",
        "Write a folder of MMLU's tasks with their data, which `pacatune evaluate mmlu` uses "
        "without a network.",
    )
    files = (
        "with MMLU's files: dev/*_dev.csv and test/*_test.csv, or Parquet or JSON Lines of "
        "cais/mmlu (default: the 280 questions that come with lm-eval)"
    )
    parser.add_argument("--from", metavar="FOLDER", dest="source", type=Path, help=files)
    parser.add_argument("--output", metavar="DIR", required=True, help="new folder to write")
    options = parser.parse_args(argv)

    from pacatune.evaluation.mmlu_data import bundled_mmlu, read_mmlu, write_tasks
    from pacatune.files.folder import check_output

    output = Path(options.output)
    check_output(output, num_bytes=0)
    source = options.source
    data = bundled_mmlu() if source is None else read_mmlu(source.expanduser())
    write_tasks(data, output)
    asked = data.shown if data.asked is None else data.asked
    num = sum(map(len, asked.values()))
    print(f"wrote {num:,} questions on {len(asked)} subjects to {output}")
    print(f"next: pacatune evaluate mmlu --model MODEL --tasks-dir {output} --output DIR")
    print_notes(data.notes)
    return 0
