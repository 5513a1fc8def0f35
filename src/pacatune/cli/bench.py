"""`pacatune bench`: measure training steps of all methods on the machine at hand."""

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pacatune.cli.options import build, give_one, parser_of, quiet_libraries
from pacatune.measure.setting import BenchConfig

_SHAPE = "512x8"


@dataclass(frozen=True, kw_only=True)
class Options:
    """Measure training steps of a model with random weights on this machine.

    That are time, operations and memory of each method, or batches and lengths until memory ends.
    """

    output: Path
    """Gets bench.json, bench.md and bench.png; run again, it goes on where it was."""
    shape: str | None = None
    """Hidden size and layers of a Llama, as HIDDENxLAYERS; by default 512x8."""
    model: str | None = None
    """A preset, a config.json or its folder."""
    heads: int | None = None
    """For --shape: attention heads; by default of 128 channels from 2048 on, else of 64."""
    kv_heads: int | None = None
    """For --shape: heads of keys and values; by default --heads."""
    intermediate_size: int | None = None
    """For --shape: width of the MLP; by default 8/3 of HIDDEN, rounded up to 128."""
    vocab_size: int | None = None
    """For --shape: size of the vocabulary; by default 8 HIDDEN, at most 32000."""


def run(argv: list[str]) -> int:
    """Run `pacatune bench` with the words after it; return the exit status."""
    parser = parser_of("bench", Options)
    skip = {"values", "title", "memory_limit"}
    parser.add_class_arguments(BenchConfig, as_group=False, skip=skip)
    text = "Memory that each process may take, such as 4GiB; by default, in a sweep on a CPU, 0.8"
    parser.add_argument("--memory_limit", metavar="SIZE", help=f"{text} of what is free.")
    given = parser.parse_args(argv)
    options = build(Options, given)
    quiet_libraries()

    from pacatune.measure.device import parse_bytes

    values, title = _model(options)
    limit = given.memory_limit and parse_bytes(given.memory_limit, "memory_limit")
    config = build(BenchConfig, given, values=values, title=title, memory_limit=limit)

    from pacatune.measure import bench

    folder = bench.result_folder(options.output)
    command = shlex.join(["pacatune", "bench", *argv])
    names = (bench.RESULT_NAME, bench.REPORT_NAME, bench.PICTURE_NAME)
    with folder.going_on("jobs", *names):
        result = bench.run(config, folder, command, print)
    for title, table in bench.tables(result).items():
        print("", f"{title}:", *table.plain(), *table.notes, sep="\n")
    print("", *bench.problems(result), sep="\n")
    written = [name for name in names if (options.output / name).is_file()]
    print(f"wrote {', '.join(written)} in {options.output}")
    # Memory that ended is a result.
    return int(any(not error.startswith("MemoryError") for error in result["errors"].values()))


def _model(options: Options) -> tuple[dict[str, Any], str]:
    from pacatune.measure.models import llama_values, load_values, parse_shape

    give_one(shape=options.shape, model=options.model)
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
