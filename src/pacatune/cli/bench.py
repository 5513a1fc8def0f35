"""`pacatune bench`: measure training steps of all methods on the machine at hand."""

import argparse
import re
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pacatune.cli.options import new_parser, positive, quiet_libraries

if TYPE_CHECKING:
    from pacatune.bench import BenchConfig

METHODS = "frozen,paca,lora,lora_dropout,dora,full"
_UNITS = {"": 1, "B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}


def run(argv: list[str]) -> int:
    """Run `pacatune bench` with the words after it; return the exit status."""
    options = _parse(argv)
    output = Path(options.output)
    quiet_libraries()
    config = _make_config(options)

    from rich.console import Console
    from rich.markdown import Markdown

    from pacatune.bench.output import REPORT_NAME, RESULT_NAME, result_folder
    from pacatune.bench.plots import save_pictures
    from pacatune.bench.report import make_report
    from pacatune.bench.running import run as measure

    console = Console(highlight=False)
    folder = result_folder(output)
    folder.open()
    command = " ".join(["pacatune bench", *map(shlex.quote, argv)])
    result = measure(config, folder, command, lambda line: console.print(line, markup=False))
    pictures = save_pictures(result, output)
    report = make_report(result, pictures)
    (output / REPORT_NAME).write_text(report, encoding="utf-8")
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
    _add_model(parser)
    add(
        "--methods", metavar="A,B", default=METHODS, help="see docs/bench.md (default: %(default)s)"
    )
    numbers = "tokens of each micro-batch (default: %(default)s)"
    add("--tokens", metavar="N,M", default="16,512,2048", help=numbers)
    add("--seq-len", type=int, default=512, help="longest row (default: %(default)s)")
    add(
        "--dtype",
        default="auto",
        help="number type of the weights; auto is bfloat16 where it is fast",
    )
    add(
        "--adapter-dtype",
        choices=("same", "float32"),
        default="same",
        help="number type of adapters; float32 beside 16-bit weights runs under autocast",
    )
    add("--device", default="auto", help="cpu, cuda, xpu, hpu, mps (default: the accelerator)")
    add("--rank", type=int, default=8, help="rank of every adapter (default: %(default)s)")
    add("--dropout", type=float, default=0.1, help="dropout of lora_dropout (default: %(default)s)")
    add("--compiled", action="store_true", help="compile models by torch.compile")
    add(
        "--sweep",
        choices=("batch", "seq-len"),
        help="instead: rows of --seq-len tokens, or one row of ever more, until memory ends",
    )
    add("--sweep-max", type=positive, metavar="N", help="largest batch or length to try")
    limit = "such as 4GiB, of each process (default: on a CPU, 0.8 of what is free in a sweep)"
    add("--memory-limit", metavar="SIZE", help=limit)
    add("--seconds", type=float, default=10.0, help="per setting and pair (default: %(default)s)")
    add("--min-rounds", type=int, default=5, help="rounds at the least (default: %(default)s)")
    add("--warmup", type=int, default=2, help="rounds before, not counted (default: %(default)s)")
    add("--threads", type=int, help="torch's on a CPU (default: all cores)")
    add(
        "--seed",
        type=int,
        default=0,
        help="seed of weights, tokens and columns (default: %(default)s)",
    )
    return parser.parse_args(argv)


def _add_model(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    default = "512x8"
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--shape", metavar="HIDDENxLAYERS", help=f"of a Llama (default: {default})")
    what.add_argument("--model", metavar="NAME", help="a preset, a config.json or its folder")
    for name, text in (
        ("heads", "attention heads (default: of 128 channels from 2048 on, else of 64)"),
        ("kv-heads", "heads of keys and values (default: --heads)"),
        ("intermediate-size", "of the MLP (default: 8/3 of HIDDEN, rounded up to 128)"),
        ("vocab-size", "(default: 8 HIDDEN, at most 32000)"),
    ):
        add(f"--{name}", type=int, metavar="N", help=f"of --shape: {text}")
    parser.set_defaults(default_shape=default)


def _make_config(options: argparse.Namespace) -> "BenchConfig":
    from pacatune.bench import BenchConfig
    from pacatune.bench.record import num_cores

    values, title = _model(options)
    return BenchConfig(
        values=values,
        title=title,
        methods=tuple(filter(None, options.methods.split(","))),
        tokens=_numbers("tokens", options.tokens),
        dtype=_dtype(options),
        threads=num_cores() if options.threads is None else options.threads,
        memory_limit=None if options.memory_limit is None else parse_bytes(options.memory_limit),
        **{
            name: getattr(options, name)
            for name in (
                "seq_len",
                "adapter_dtype",
                "device",
                "rank",
                "dropout",
                "compiled",
                "seconds",
                "min_rounds",
                "warmup",
                "seed",
                "sweep",
                "sweep_max",
            )
        },
    )


def _model(options: argparse.Namespace) -> tuple[dict[str, Any], str]:
    from pacatune.bench import llama_values, load_values, parse_shape

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
    text = options.shape or options.default_shape
    hidden_size, num_layers = parse_shape(text)
    return llama_values(hidden_size, num_layers, **sizes), f"Llama {text}"


def _dtype(options: argparse.Namespace) -> str:
    from pacatune.bench.device import choose_device
    from pacatune.precision import bfloat16_is_fast

    if options.dtype != "auto":
        return str(options.dtype)
    is_cpu = choose_device(options.device).type == "cpu"
    return "bfloat16" if bfloat16_is_fast(use_cpu=is_cpu) else "float32"


def _numbers(name: str, text: str) -> tuple[int, ...]:
    try:
        return tuple(int(number) for number in text.split(","))
    except ValueError:
        raise ValueError(
            f"`{name}` ({text!r}) must be whole numbers with commas between, such as 16,512."
        ) from None


def parse_bytes(text: str) -> int:
    """Return the bytes of a size such as `4GiB`.

    Raises:
        ValueError: If it is none.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", text)
    if match is None or match[2] not in _UNITS or not float(match[1]):
        raise ValueError(
            f"`memory_limit` ({text!r}) must be a number and a unit, such as 512MiB or 4GiB."
        )
    return int(float(match[1]) * _UNITS[match[2]])
