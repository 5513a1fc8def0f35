"""`pacatune estimate`: how much memory training takes, without a GPU or weights."""

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pacatune.cli.options import (
    add_fields,
    field_helps,
    field_values,
    names,
    new_parser,
    print_notes,
    quiet_libraries,
)
from pacatune.measure.presets import PRESETS
from pacatune.measure.setting import Setting
from pacatune.methods import TEXT_METHODS, method_of

if TYPE_CHECKING:
    from pacatune.measure.estimate import Estimate, Quantity
    from pacatune.measure.roofline import StepTime

_QUANTITIES: dict[str, "Quantity"] = {
    "seq-len": "seq_len",
    "batch": "batch_size",
    "rank": "rank",
}


def run(argv: list[str]) -> int:
    """Run `pacatune estimate` with the words after it; return the exit status."""
    options = _parse(argv)
    quiet_libraries()

    from pacatune.measure.models import find_values
    from pacatune.reports.figures import check_picture_path

    methods = options.methods or [options.method]
    settings = {name: _setting(options, name, len(methods)) for name in methods}
    available = _available_bytes(options)
    if options.plot is not None:
        check_picture_path(options.plot)
    find_values(options.model)  # refuses a wrong one before PEFT is imported, which takes seconds

    from pacatune.measure.pictures import save_plot
    from pacatune.measure.roofline import rates_of

    if options.time:
        rates_of(options.gpu)  # refuses those that it does not know
    quantity = _QUANTITIES.get(options.max)
    answers = {name: _answer(setting, quantity, available) for name, setting in settings.items()}
    values = {name: answer.to_values() for name, answer in answers.items()}
    times = _times(answers, options.gpu) if options.time else {}
    for name, step in times.items():
        values[name]["time"] = step.to_values()
    if options.json:
        alone = options.methods is None
        print(json.dumps(values[options.method] if alone else {"methods": values}, indent=2))
    else:
        _print_table(answers, options.model, available)
        print_notes(dict.fromkeys(note for row in values.values() for note in row["notes"]))
        if times:
            _print_times(times, options.gpu)
    if options.plot is not None:
        bars = {name: one.estimate for name, one in answers.items() if one.estimate is not None}
        save_plot(bars, options.plot, available, options.gpu or "available")
    return 0


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = new_parser(
        "estimate",
        "Estimate the memory of training by running its real step on tensors without memory.",
    )
    add, helps = parser.add_argument, field_helps(Setting)
    ships = f"{helps.get('model', '')}; these ship with it: {', '.join(PRESETS)}"
    add("model", metavar="MODEL", help=ships)
    which = parser.add_mutually_exclusive_group()
    method = f"{helps.get('method', '')} (default: %(default)s)"
    which.add_argument("--method", default="paca", metavar="NAME", help=method)
    which.add_argument("--methods", type=names, metavar="A,B,...", help="several, side by side")
    add_fields(parser, Setting, skip=("model", "method"))
    add("--gpu", metavar="NAME", help="does it fit on this one: a100-80g, h100, 4090, ...")
    add("--memory", metavar="SIZE", help="or in this much, such as 24GiB")
    add("--max", choices=list(_QUANTITIES), help="find the largest that fits")
    add("--time", action="store_true", help="estimate a step's time on that GPU, by a roofline")
    add("--plot", type=Path, metavar="FILE", help="write stacked bars as a PNG, SVG or PDF")
    add("--json", action="store_true", help="print everything as JSON, in bytes")
    options = parser.parse_args(argv)
    if options.gpu is not None and options.memory is not None:
        parser.error("--gpu and --memory both say how much there is; give one")
    if options.max is not None and options.gpu is None and options.memory is None:
        parser.error("--max needs --gpu or --memory")
    if options.time and options.gpu is None:
        parser.error("--time needs --gpu, whose rates it takes")
    return options


def _setting(options: argparse.Namespace, method: str, num_methods: int) -> Setting:
    given = {"method": method, "dropout": 0.0}
    if (
        num_methods > 1 and not method_of(method, TEXT_METHODS).is_paca
    ):  # beside methods that have groups
        given["groups"] = 1
    setting = Setting(**field_values(options, Setting) | given)
    if num_methods > 1 and not setting.row.has_dropout:
        return setting  # beside methods that have dropout
    return setting.but(dropout=options.dropout or setting.dropout)


def _available_bytes(options: argparse.Namespace) -> int | None:
    from pacatune.measure.device import gpu_bytes, parse_bytes

    if options.gpu is not None:
        return gpu_bytes(options.gpu)
    return None if options.memory is None else parse_bytes(options.memory)


@dataclass(frozen=True)
class _Answer:
    """The answer for one method."""

    estimate: "Estimate | None"
    """None where nothing fits."""
    quantity: "Quantity | None"
    largest: int | None
    """Largest value that fits, where one was asked for."""
    available: int | None

    def to_values(self) -> dict[str, Any]:
        """Return everything as plain values."""
        values: dict[str, Any] = {}
        if self.quantity is not None:
            values[f"max_{self.quantity}"] = self.largest
        values |= {"notes": []} if self.estimate is None else self.estimate.to_values()
        if self.available is not None:
            values["available_bytes"] = self.available
            values["fits"] = "no" if self.estimate is None else self.estimate.fits(self.available)
        return values

    def to_cells(self) -> dict[str, str]:
        """Return a column of the table by the titles of its rows."""
        cells = {} if self.quantity is None else {f"max {self.quantity}": f"{self.largest:,}"}
        one = self.estimate
        if one is not None:
            cells |= {name: _gib(number) for name, number in one.measured.by_category.items()}
            cells["peak"] = _gib(one.peak_bytes)
            cells["device needs"], cells["to"] = _gib(one.low_bytes), _gib(one.high_bytes)
        return cells if self.available is None else cells | {"fits": self._verdict(self.available)}

    def _verdict(self, available: int) -> str:
        """Say whether it fits and, if not for sure, by how much it is over."""
        if self.estimate is None:
            return "no"
        verdict = self.estimate.fits(available)
        if verdict == "no":
            return f"no, over by {_gib(self.estimate.low_bytes - available)} GiB"
        if verdict == "perhaps":
            return f"perhaps, over by up to {_gib(self.estimate.high_bytes - available)} GiB"
        return verdict


def _answer(setting: Setting, quantity: "Quantity | None", available: int | None) -> _Answer:
    from pacatune.measure.estimate import estimate_memory, find_max

    if quantity is None or available is None:
        return _Answer(estimate_memory(setting), None, None, available)
    largest, estimate = find_max(setting, quantity, available)
    return _Answer(estimate, quantity, largest, available)


def _times(answers: dict[str, _Answer], gpu: str) -> dict[str, "StepTime"]:
    """Return the time of each method's step, where one fits."""
    from pacatune.measure.roofline import estimate_time

    found = {name: answer.estimate for name, answer in answers.items()}
    return {name: estimate_time(one.setting, gpu) for name, one in found.items() if one is not None}


def _print_times(times: dict[str, "StepTime"], gpu: str) -> None:
    from rich.console import Console
    from rich.table import Table

    from pacatune.measure.roofline import MODEL

    table = Table(title=f"estimated ms of a step on {gpu}, not measured", title_justify="left")
    table.add_column("")
    for name in times:
        table.add_column(name, justify="right")
    steps = list(times.values())
    rows = {"step": [f"{one.ms:.1f}" for one in steps]}
    rows["by the rate of products"] = [f"{one.low_ms:.1f} to {one.high_ms:.1f}" for one in steps]
    for kind in steps[0].by_kind_ms:
        rows[kind] = [f"{one.by_kind_ms[kind]:.1f}" for one in steps]
    rows["kernels"] = [f"{one.num_launches:,}" for one in steps]
    if len(steps) > 1:
        rows[f"{next(iter(times))}'s share"] = [f"{steps[0].ms / one.ms:.2f}" for one in steps]
    for title, cells in rows.items():
        table.add_row(title, *cells)
    Console(markup=False, highlight=False).print(table)
    print_notes(dict.fromkeys([MODEL, *(note for one in steps for note in one.notes)]))


def _print_table(answers: dict[str, _Answer], model: str, available: int | None) -> None:
    from rich.console import Console
    from rich.table import Table

    from pacatune.measure.tracker import CATEGORIES

    memory = "" if available is None else f", of {_gib(available)} GiB"
    table = Table(title=f"{model}: GiB at the peak{memory}", title_justify="left")
    table.add_column("")
    for name in answers:
        table.add_column(name, justify="right")
    cells = [answer.to_cells() for answer in answers.values()]
    largest = [f"max {quantity}" for quantity in _QUANTITIES.values()]
    for title in (*largest, *CATEGORIES, "peak", "device needs", "to", "fits"):
        row = [found.get(title, "") for found in cells]
        if any(row):
            table.add_row(title, *row)
    console = Console(markup=False, highlight=False)
    console.print(table)
    for name, answer in answers.items():
        if answer.estimate is not None:
            saved = answer.estimate.measured.saved_by_module.items()
            parts = ", ".join(f"{kind} {_gib(number)}" for kind, number in saved if number > 2**20)
            console.print(f"{name} keeps for backward: {parts or 'nothing'}", soft_wrap=True)


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.2f}"
