"""`pacatune estimate`: how much memory training takes, without a GPU or weights."""

import argparse
import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pacatune.cli.options import names, new_parser, print_notes, quiet_libraries

if TYPE_CHECKING:
    from pacatune.memory.estimate import Estimate, Quantity
    from pacatune.memory.setting import Setting
    from pacatune.memory.tracker import Category

_QUANTITIES: dict[str, "Quantity"] = {
    "seq-len": "seq_len",
    "batch": "batch_size",
    "rank": "rank",
}
# Options of this command that are no fields of a Setting.
_OWN = ("model", "method", "methods", "gpu", "memory", "max", "plot", "json")


def run(argv: list[str]) -> int:
    """Run `pacatune estimate` with the words after it; return the exit status."""
    options = _parse(argv)
    quiet_libraries()

    from pacatune.memory.plot import check_plot_path, save_plot

    methods = options.methods or [options.method]
    settings = {name: _setting(options, name, len(methods)) for name in methods}
    available = _available_bytes(options)
    if options.plot is not None:
        check_plot_path(options.plot)
    quantity = _QUANTITIES[options.max] if options.max else None
    results = {name: _estimate(one, quantity, available) for name, one in settings.items()}
    values = {name: _values(*result, quantity, available) for name, result in results.items()}
    if options.json:
        alone = options.methods is None
        print(json.dumps(values[options.method] if alone else {"methods": values}, indent=2))
    else:
        _print_table(results, quantity, available, options.model)
        for note in dict.fromkeys(note for row in values.values() for note in row["notes"]):
            print_notes([note])
    if options.plot is not None:
        bars = {name: estimate for name, (_, estimate) in results.items() if estimate is not None}
        save_plot(bars, options.plot, available)
    return 0


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = new_parser(
        "estimate",
        "Estimate the memory of training by running its real step on tensors without memory.",
    )
    add = parser.add_argument
    add("model", metavar="MODEL", help=_MODEL_HELP)
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--method", default="paca", metavar="NAME", help=_METHOD_HELP)
    which.add_argument("--methods", type=names, metavar="A,B,...", help="several, side by side")
    add("--rank", type=int, default=8, help="columns or rank of the adapter (default: %(default)s)")
    add("--dropout", type=float, default=0.0, help="dropout of lora, dora, moslora (default: none)")
    add("--batch-size", type=int, default=1, help="sequences per step (default: %(default)s)")
    add("--seq-len", type=int, default=512, help="tokens of each (default: %(default)s)")
    add("--dtype", default="bfloat16", help="number type of the weights (default: %(default)s)")
    add(
        "--adapter-dtype",
        default="float32",
        help="number type of the adapter (default: %(default)s)",
    )
    add("--quantization", metavar="KIND", help="4-bit weights: nf4 or fp4")
    add("--gradient-checkpointing", action="store_true", help="recompute blocks in backward")
    add("--lean", default="auto", help="lean layers: off, auto or require (default: %(default)s)")
    add("--loss", default="auto", help=_LOSS_HELP)
    accumulation = "micro-batches per optimiser step (default: %(default)s)"
    add("--gradient-accumulation", type=int, default=1, metavar="N", help=accumulation)
    add("--sharding", default="none", metavar="KIND", help="zero1, zero2, zero3 or fsdp2")
    add("--num-gpus", type=int, default=1, help="that share it (default: %(default)s)")
    add("--target-modules", type=names, metavar="A,B,...", help=_TARGETS_HELP)
    add("--gpu", metavar="NAME", help="does it fit on this one: a100-80g, h100, 4090, ...")
    add("--memory", metavar="SIZE", help="or in this much, such as 24GiB")
    add("--max", choices=list(_QUANTITIES), help="find the largest that fits")
    add("--plot", type=Path, metavar="FILE", help="write stacked bars as a PNG, SVG or PDF")
    add("--json", action="store_true", help="print everything as JSON, in bytes")
    options = parser.parse_args(argv)
    if options.gpu is not None and options.memory is not None:
        parser.error("--gpu and --memory both say how much there is; give one")
    if options.max is not None and options.gpu is None and options.memory is None:
        parser.error("--max needs --gpu or --memory")
    return options


_MODEL_HELP = (
    "llama2-7b, llama2-13b, llama3-8b, llama3.1-70b, llama3.2-1b, llama3.2-3b, qwen3-8b, "
    "gemma3-12b, mistral-7b; or a config.json, a model folder, a hub id"
)
_METHOD_HELP = (
    "paca, lora, lora_dropout, dora, moslora or full; qpaca and qlora are on nf4 "
    "(default: %(default)s)"
)
_LOSS_HELP = (
    "logits: all of them; chunked: never all, as `pacatune train`; auto: logits where lean is off "
    "(default: %(default)s)"
)
_TARGETS_HELP = "adapted modules (default: the linear layers of the blocks)"


def _setting(options: argparse.Namespace, method: str, num_methods: int) -> "Setting":
    from pacatune.memory.setting import Setting

    values = {name: value for name, value in vars(options).items() if name not in _OWN}
    values |= {"model": options.model, "method": method, "dropout": 0.0}
    values["target_modules"] = tuple(options.target_modules or ())
    setting = Setting(**values)
    if num_methods > 1 and not setting.row.has_dropout:
        return setting  # beside methods that have dropout
    return setting.but(dropout=options.dropout or setting.dropout)


def _available_bytes(options: argparse.Namespace) -> int | None:
    from pacatune.memory.gpus import gpu_bytes, parse_bytes

    if options.gpu is not None:
        return gpu_bytes(options.gpu)
    return None if options.memory is None else parse_bytes(options.memory)


def _estimate(
    setting: "Setting", quantity: "Quantity | None", available: int | None
) -> tuple[int | None, "Estimate | None"]:
    from pacatune.memory.estimate import estimate_memory, find_max

    if quantity is None or available is None:
        return None, estimate_memory(setting)
    return find_max(setting, quantity, available)


def _values(
    largest: int | None,
    estimate: "Estimate | None",
    quantity: "Quantity | None",
    available: int | None,
) -> dict[str, Any]:
    values: dict[str, Any] = {} if quantity is None else {f"max_{quantity}": largest}
    values |= {"notes": []} if estimate is None else estimate.to_values()
    if available is not None:
        values["available_bytes"] = available
        values["fits"] = "no" if estimate is None else estimate.fits(available)
    return values


def _print_table(
    results: dict[str, tuple[int | None, "Estimate | None"]],
    quantity: "Quantity | None",
    available: int | None,
    model: str,
) -> None:
    from rich.console import Console
    from rich.table import Table

    memory = "" if available is None else f", of {_gib(available)} GiB"
    table = Table(title=f"{model}: GiB at the peak{memory}", title_justify="left")
    table.add_column("")
    for name in results:
        table.add_column(name, justify="right")
    for title, cell in _rows(results, quantity, available):
        cells = [cell(*result) for result in results.values()]
        if any(cells):
            table.add_row(title, *cells)
    console = Console(markup=False, highlight=False)
    console.print(table)
    for name, (_, estimate) in results.items():
        if estimate is not None:
            saved = estimate.measured.saved_by_module.items()
            parts = ", ".join(f"{kind} {_gib(number)}" for kind, number in saved if number > 2**20)
            console.print(f"{name} keeps for backward: {parts or 'nothing'}", soft_wrap=True)


def _rows(
    results: Any, quantity: "Quantity | None", available: int | None
) -> Iterator[tuple[str, Callable[[Any, Any], str]]]:
    """Yield the title of each row, and what makes a cell of a maximum and an estimate."""
    from pacatune.memory.tracker import CATEGORIES

    if quantity is not None:
        yield f"max {quantity}", lambda largest, estimate: f"{largest:,}"
    for category in CATEGORIES:
        yield category, partial(_part, category)
    yield "peak", lambda largest, estimate: estimate and _gib(estimate.peak_bytes)
    yield "device needs", lambda largest, estimate: estimate and _gib(estimate.low_bytes)
    yield "to", lambda largest, estimate: estimate and _gib(estimate.high_bytes)
    if available is not None:
        yield "fits", lambda largest, estimate: estimate.fits(available) if estimate else "no"


def _part(category: "Category", largest: int | None, estimate: "Estimate | None") -> str:
    number = 0 if estimate is None else estimate.measured.by_category.get(category, 0)
    return _gib(number) if number else ""


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.2f}"
