"""`pacatune bench`: measure training steps of all methods on the machine at hand."""

import argparse
import shlex
from pathlib import Path
from typing import Any

from pacatune.cli.options import add_fields, field_values, new_parser, quiet_libraries
from pacatune.measure.setting import BenchConfig

_SHAPE = "512x8"


def run(argv: list[str]) -> int:
    """Run `pacatune bench` with the words after it; return the exit status."""
    options = _parse(argv)
    output = Path(options.output)
    quiet_libraries()
    config = _make_config(options)

    from rich.console import Console
    from rich.markdown import Markdown

    from pacatune.measure.bench import REPORT_NAME, RESULT_NAME, result_folder
    from pacatune.measure.bench import run as measure
    from pacatune.measure.pictures import save_pictures
    from pacatune.measure.report import make_report

    console = Console(highlight=False)
    folder = result_folder(output)
    folder.start_anew()
    folder.write_json(RESULT_NAME, {"finished": False})
    command = " ".join(["pacatune bench", *map(shlex.quote, argv)])
    result = measure(config, folder, command, lambda line: console.print(line, markup=False))
    with folder.staged() as staging:
        pictures = save_pictures(result, staging)
    report = make_report(result, pictures)
    folder.write(REPORT_NAME, report)
    console.print(Markdown(report.partition("\n![")[0]))
    written = ", ".join([RESULT_NAME, REPORT_NAME, *pictures])
    console.print(f"wrote {written} in {output}", markup=False, soft_wrap=True)
    return 0


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = new_parser(
        "bench",
        "Measure training steps of a model with random weights on this machine: time, operations "
        "and memory of each method, or batches and lengths until memory ends.",
    )
    add = parser.add_argument
    add("--output", metavar="DIR", required=True, help="gets bench.json, bench.md and pictures")
    what = parser.add_mutually_exclusive_group()
    shape = f"hidden size and layers of a Llama (default: {_SHAPE})"
    what.add_argument("--shape", metavar="HIDDENxLAYERS", help=shape)
    what.add_argument("--model", metavar="NAME", help="a preset, a config.json or its folder")
    for name, text in (
        ("heads", "attention heads (default: of 128 channels from 2048 on, else of 64)"),
        ("kv-heads", "heads of keys and values (default: --heads)"),
        ("intermediate-size", "width of the MLP (default: 8/3 of HIDDEN, rounded up to 128)"),
        ("vocab-size", "size of the vocabulary (default: 8 HIDDEN, at most 32000)"),
    ):
        add(f"--{name}", type=int, metavar="N", help=f"for --shape: {text}")
    size = {"type": str, "metavar": "SIZE"}
    add_fields(parser, BenchConfig, skip=("values", "title"), memory_limit=size)
    return parser.parse_args(argv)


def _make_config(options: argparse.Namespace) -> BenchConfig:
    from pacatune.measure.device import parse_bytes

    values, title = _model(options)
    given = field_values(options, BenchConfig)
    if given["memory_limit"] is not None:
        given["memory_limit"] = parse_bytes(given["memory_limit"], "memory_limit")
    return BenchConfig(values=values, title=title, **given)


def _model(options: argparse.Namespace) -> tuple[dict[str, Any], str]:
    from pacatune.measure.models import llama_values, load_values, parse_shape

    sizes = {
        "num_heads": options.heads,
        "num_kv_heads": options.kv_heads,
        "intermediate_size": options.intermediate_size,
        "vocab_size": options.vocab_size,
    }
    if options.model is not None:
        if given := [name for name, value in sizes.items() if value is not None]:
            raise ValueError(f"`{given[0]}` is for --shape; --model {options.model!r} has its own.")
        return load_values(options.model), options.model
    text = options.shape or _SHAPE
    hidden_size, num_layers = parse_shape(text)
    return llama_values(hidden_size, num_layers, **sizes), f"Llama {text}"
