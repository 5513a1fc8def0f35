"""`pacatune evaluate WHAT`: the table of evaluations, and what those that load a model share."""

import argparse
import importlib
import shlex
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pacatune.cli.options import (
    add_base_options,
    add_fields,
    check_base,
    field_values,
    new_parser,
    positive,
    print_notes,
    quiet_libraries,
)
from pacatune.cli.subcommands import Subcommands, run_subcommand
from pacatune.names import full_name
from pacatune.precision import DTYPES
from pacatune.pretrained import QUANTIZATIONS

if TYPE_CHECKING:
    from pacatune.adapters.loading import LoadedModel
    from pacatune.evaluation.output import Report

# Takes model, tokenizer, `batch_size` and `progress`; yields the report, again with every further
# part that is known.
Score = Callable[..., "Iterable[Report]"]


def run(argv: list[str]) -> int:
    """Run the evaluation that the first word names with the words after it; return its status."""
    return run_subcommand(
        "evaluate",
        SUBCOMMANDS,
        argv,
        description="Score a model, with or without an adapter.",
        kind="evaluation",
    )


def evaluate(name: str, argv: list[str]) -> int:
    """Score the model that the words name, write and print the report; return the exit status.

    The module `pacatune.cli.evaluate_NAME` (`-` as `_`) has the DESCRIPTION of the command and
    `add_options`. Its `prepare` reads what it needs before a model is loaded; it returns the
    settings that decide the numbers, and what scores.
    """
    module = importlib.import_module(f"pacatune.cli.evaluate_{name.replace('-', '_')}")
    parser = new_parser(f"evaluate {name}", module.DESCRIPTION)
    _add_model_options(parser)
    module.add_options(parser.add_argument)
    options = parser.parse_args(argv)
    check_base(options, options.output)
    quiet_libraries()
    settings, score = module.prepare(options)

    from rich.console import Console

    from pacatune.evaluation.output import describe, open_output, write_report

    output = Path(options.output)
    open_output(output)
    settings = settings | values_of(options, "quantization", "batch_size")
    command = " ".join(["pacatune evaluate", name, *map(shlex.quote, argv)])
    with _loaded_model(options) as loaded:
        head = describe(loaded, command, settings)
        speed = {"batch_size": options.batch_size, "progress": True}
        for report in score(loaded.model, loaded.tokenizer, **speed):
            write_report(output, head, report, finished=False)
        write_report(output, head, report, finished=True)
    console = Console(highlight=False)
    console.print(report.table())
    for note in report.notes:
        console.print(note, style="dim", markup=False)
    console.print(f"wrote {output}", markup=False, soft_wrap=True)
    return 0


def _add_model_options(parser: argparse.ArgumentParser) -> None:
    add_base_options(parser, adapter_required=False, device="auto")
    add = parser.add_argument
    add("--output", metavar="DIR", required=True, help="new folder of the result")
    dtype = "number type of the base (default: its own)"
    add("--dtype", type=full_name, choices=DTYPES, default="auto", help=dtype)
    bits = (
        "hold the base in fewer bits, as `train --model.quantization`; a PaCA adapter trained so "
        "does it by itself"
    )
    add("--quantization", choices=QUANTIZATIONS, help=bits)
    batch = "examples evaluated at once; more is faster on a GPU (default: %(default)s)"
    add("--batch-size", type=positive, default=8, help=batch)


@contextmanager
def _loaded_model(options: argparse.Namespace) -> Iterator["LoadedModel"]:
    """Load the model that the options name, and print what there is to know about it.

    It is this command's alone, so adapted columns are kept in its weights.
    """
    from pacatune import resident
    from pacatune.adapters.loading import load_language_model

    names = ("dtype", "device", "quantization", "allow_other_base")
    loaded = load_language_model(options.model, options.adapter, **values_of(options, *names))
    print_notes(loaded.notes)
    with resident(loaded.model):
        yield loaded


def values_of(options: argparse.Namespace, *names: str) -> dict[str, Any]:
    """Return some of the options by name."""
    return {name: getattr(options, name) for name in names}


def write_mmlu_data(argv: list[str]) -> int:
    """Run `pacatune evaluate mmlu-data`."""
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


def run_mt_bench(argv: list[str]) -> int:
    """Run `pacatune evaluate mt-bench`; 1 if no answer was judged."""
    from pacatune.evaluation.mt_bench import MtBenchConfig

    parser = new_parser(
        "evaluate mt-bench",
        "Let a model answer MT-Bench's 80 questions of two turns and a judge grade the answers. "
        "A run that was stopped goes on when the same command is given again.",
    )
    add_fields(parser, MtBenchConfig)
    config = MtBenchConfig(**field_values(parser.parse_args(argv), MtBenchConfig))
    quiet_libraries()

    from rich.console import Console

    from pacatune.evaluation.mt_bench import run_mt_bench as run

    consoles = Console(highlight=False), Console(stderr=True, highlight=False)
    result = run(config, *consoles)
    return 0 if config.no_judge or result["table"][-1]["num_judged"] else 1


SUBCOMMANDS: Subcommands = {
    "mmlu": (
        partial(evaluate, "mmlu"),
        "MMLU with five examples in the prompt, by category as in the paper",
    ),
    "mmlu-data": (
        write_mmlu_data,
        "write MMLU's questions as a local folder of tasks, for use offline",
    ),
    "lm-eval": (partial(evaluate, "lm-eval"), "any other task of lm-eval"),
    "mt-bench": (run_mt_bench, "80 questions of two turns, answers graded by another model"),
    "choice": (
        partial(evaluate, "choice"),
        "multiple choice: social_iqa, goal_inference, fever, or your own questions",
    ),
    "perplexity": (partial(evaluate, "perplexity"), "perplexity and bits per byte of text"),
}
