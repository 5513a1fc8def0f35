"""`pacatune estimate`: how much memory training takes, without a GPU or weights."""

import json
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pacatune.cli.options import give_one, print_notes, quiet_libraries
from pacatune.measure.setting import Setting
from pacatune.methods import TEXT_METHODS, method_of

if TYPE_CHECKING:
    from pacatune.measure.estimate import Estimate, Quantity

_QUANTITIES: dict[str, "Quantity"] = {
    "seq-len": "seq_len",
    "batch": "batch_size",
    "rank": "rank",
}
Values = dict[str, Any]
"""What JSON says of one method."""


@dataclass(frozen=True, kw_only=True)
class EstimateCommand(Setting):
    """Estimate the memory of training by running its real step on tensors without memory.

    These models ship with it: llama2-7b, llama2-13b, llama3-8b, llama3.1-70b, llama3.2-1b,
    llama3.2-3b, qwen3-8b, gemma3-12b, mistral-7b.
    """

    model: str = field(kw_only=False)
    method: str = ""
    """One method; by default paca. qpaca and qlora set the quantisation nf4, lora_dropout a
    dropout."""
    methods: tuple[str, ...] = ()
    """Or several, side by side."""
    gpu: str | None = None
    """Does it fit on this one: a100-80g, h100, 4090, ..."""
    memory: str | None = None
    """Or in this much, such as 24GiB."""
    max: Literal["seq-len", "batch", "rank"] | None = None
    """Find the largest that fits."""
    time: bool = False
    """Estimate a step's time on that GPU, by a roofline."""
    plot: Path | None = None
    """Write stacked bars as a PNG, SVG or PDF."""
    json: bool = False
    """Print everything as JSON, in bytes."""

    def __post_init__(self) -> None:
        """Refuse what is too much or too little; the settings are checked by method."""
        give_one(gpu=self.gpu, memory=self.memory)
        give_one(method=self.method, methods=self.methods)
        if self.max is not None and self.gpu is None and self.memory is None:
            raise ValueError("--max needs --gpu or --memory.")
        if self.time and self.gpu is None:
            raise ValueError("--time needs --gpu, whose rates it takes.")

    def setting(self, method: str) -> Setting:
        """Return the setting of one method, without what it has not and others beside it have."""
        values = {f.name: getattr(self, f.name) for f in fields(Setting)}
        values |= {"method": method, "dropout": 0.0}
        if len(self.methods) > 1 and not method_of(method, TEXT_METHODS).is_paca:
            values["groups"] = 1
        setting = Setting(**values)
        if len(self.methods) > 1 and not setting.row.has_dropout:
            return setting
        return setting.but(dropout=self.dropout or setting.dropout)

    def run(self, command: str) -> int:
        """Do it."""
        quiet_libraries()

        from pacatune.measure.device import gpu_bytes, parse_bytes
        from pacatune.measure.models import find_values
        from pacatune.reports.figures import check_picture_path

        settings = {name: self.setting(name) for name in self.methods or [self.method or "paca"]}
        available = None if self.memory is None else parse_bytes(self.memory)
        if self.gpu is not None:
            available = gpu_bytes(self.gpu)
        if self.plot is not None:
            check_picture_path(self.plot)
        find_values(self.model)  # refuses a wrong one before PEFT is imported, which takes seconds

        from pacatune.measure.pictures import save_plot
        from pacatune.measure.roofline import estimate_time, rates_of

        if self.time:
            rates_of(str(self.gpu))  # refuses those that it does not know
        quantity = _QUANTITIES[self.max] if self.max else None
        values, bars = {}, {}
        for name, setting in settings.items():
            values[name], found = _estimate(setting, quantity, available)
            if found is None:
                continue
            bars[name] = found
            if self.time:
                values[name]["time"] = estimate_time(found.setting, str(self.gpu)).to_values()
        if self.json:
            one = next(iter(values.values()))
            print(json.dumps({"methods": values} if self.methods else one, indent=2))
        else:
            _print_memory(values, self.model, available)
            _print_times({n: one["time"] for n, one in values.items() if "time" in one}, self.gpu)
        if self.plot is not None:
            save_plot(bars, self.plot, available, self.gpu or "available")
        return 0


command = EstimateCommand


def _estimate(
    setting: Setting, quantity: "Quantity | None", available: int | None
) -> "tuple[Values, Estimate | None]":
    """Return what JSON says of a method, and its estimate unless nothing fits."""
    from pacatune.measure.estimate import estimate_memory, find_max

    values: Values = {}
    estimate: Estimate | None
    if quantity is None or available is None:
        estimate = estimate_memory(setting)
    else:
        values[f"max_{quantity}"], estimate = find_max(setting, quantity, available)
    values |= {"notes": []} if estimate is None else estimate.to_values()
    if available is not None:
        values["available_bytes"] = available
        values["fits"] = "no" if estimate is None else estimate.fits(available)
    return values, estimate


def _print_memory(values: dict[str, Values], model: str, available: int | None) -> None:
    from pacatune.measure.tracker import CATEGORIES

    memory = "" if available is None else f", of {_gib(available)} GiB"
    columns = {name: _cells(one, available) for name, one in values.items()}
    largest = [f"max {quantity}" for quantity in _QUANTITIES.values()]
    titles = (*largest, *CATEGORIES, "peak", "device needs", "to", "fits")
    _print_table(f"{model}: GiB at the peak{memory}", titles, columns)
    for name, one in values.items():
        if "peak_bytes" in one:
            saved = one["saved_by_module"].items()
            parts = ", ".join(f"{kind} {_gib(number)}" for kind, number in saved if number > 2**20)
            print(f"{name} keeps for backward: {parts or 'nothing'}")
    print_notes(dict.fromkeys(note for one in values.values() for note in one["notes"]))


def _cells(one: Values, available: int | None) -> dict[str, str]:
    """Return a column of the table by the titles of its rows."""
    cells = {f"max {q}": f"{one[f'max_{q}']:,}" for q in _QUANTITIES.values() if f"max_{q}" in one}
    fits = one.get("fits", "")
    if "peak_bytes" in one:
        low, high = one["device_bytes"].values()
        cells |= {name: _gib(number) for name, number in one["by_category"].items()}
        cells |= {"peak": _gib(one["peak_bytes"]), "device needs": _gib(low), "to": _gib(high)}
        if available is not None and fits == "no":
            fits = f"no, over by {_gib(low - available)} GiB"
        elif available is not None and fits == "perhaps":
            fits = f"perhaps, over by up to {_gib(high - available)} GiB"
    return cells | {"fits": fits}


def _print_times(times: dict[str, Values], gpu: str | None) -> None:
    if not times:
        return
    first_name, first = next(iter(times.items()))
    columns = {
        name: {
            "step": f"{one['step_ms']:.1f}",
            "by the rate of products": f"{one['low_ms']:.1f} to {one['high_ms']:.1f}",
            **{kind: f"{ms:.1f}" for kind, ms in one["by_kind_ms"].items()},
            "kernels": f"{one['num_launches']:,}",
            f"{first_name}'s share": f"{first['step_ms'] / one['step_ms']:.2f}",
        }
        for name, one in times.items()
    }
    _print_table(f"estimated ms of a step on {gpu}, not measured", columns[first_name], columns)
    print_notes(
        dict.fromkeys([first["model"], *(note for one in times.values() for note in one["notes"])])
    )


def _print_table(title: str, rows: Iterable[str], columns: dict[str, dict[str, str]]) -> None:
    """Print a column for each method, without rows that are empty."""
    from rich.console import Console
    from rich.table import Table

    table = Table("", *columns, title=title, title_justify="left")
    for row in rows:
        if any(cells := [column.get(row, "") for column in columns.values()]):
            table.add_row(row, *cells)
    Console(markup=False, highlight=False).print(table)


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.2f}"
