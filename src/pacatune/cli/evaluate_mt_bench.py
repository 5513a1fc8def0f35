"""`pacatune evaluate mt-bench`: 80 questions of two turns, graded by a judge."""

from rich.console import Console

from pacatune.cli.options import add_fields, field_values, new_parser, quiet_libraries
from pacatune.evaluation.mt_bench import MtBenchConfig, run_mt_bench

EXIT_NOTHING_JUDGED = 1


def run(argv: list[str]) -> int:
    """Run `pacatune evaluate mt-bench` with the words after it; return the exit status."""
    parser = new_parser(
        "evaluate mt-bench",
        "Let a model answer MT-Bench's 80 questions of two turns and a judge grade the answers. "
        "A run that was stopped goes on when the same command is given again.",
    )
    add_fields(parser, MtBenchConfig)
    config = MtBenchConfig(**field_values(parser.parse_args(argv), MtBenchConfig))
    quiet_libraries()
    result = run_mt_bench(config, Console(highlight=False), Console(stderr=True, highlight=False))
    return 0 if config.no_judge or result["table"][-1]["num_judged"] else EXIT_NOTHING_JUDGED
