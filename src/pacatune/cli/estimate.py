"""`pacatune estimate`: how much memory training takes, without a GPU or weights."""

import json
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, Literal

from pacatune.cli.options import give_one, print_notes, quiet_libraries
from pacatune.measure.setting import Setting
from pacatune.methods import TEXT_METHODS, method_of
from pacatune.training.sections import LoraSection, PacaSection

if TYPE_CHECKING:
    from pacatune.measure.estimate import Quantity
    from pacatune.measure.simulate import Estimate

_NEEDS = (
    "a device needs the peak and 0.4 GiB for CUDA and its libraries, or as much as the peak, 0.7 "
    "GiB and\ngaps between blocks of memory: a fifth of what comes and goes within a step."
)
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
    rank: int | None = None  # type: ignore[assignment]
    """Columns or rank of the adapter; where not given, `train`'s: 16 for paca, 8 for others."""
    batch_size: int = 8
    """Sequences per micro-batch, on each device; by default as many as in `train`."""
    seq_len: int = 1024
    """Tokens per sequence, none of them padding; by default at most as many as in `train`."""
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
    json: bool = False
    """Print everything as JSON, in bytes."""

    def __post_init__(self) -> None:
        """Refuse what is too much or too little; the settings are checked by method."""
        give_one(gpu=self.gpu, memory=self.memory)
        give_one(method=self.method, methods=self.methods)
        if self.max is not None and self.gpu is None and self.memory is None:
            raise ValueError("--max needs --gpu or --memory.")

    def setting(self, method: str) -> Setting:
        """Return the setting of one method, without what it has not and others beside it have."""
        values = {f.name: getattr(self, f.name) for f in fields(Setting)}
        is_paca = method_of(method, TEXT_METHODS).is_paca
        values |= {"method": method, "dropout": 0.0}
        values["rank"] = self.rank or (PacaSection.r if is_paca else LoraSection.r)
        values["channels"] = self.channels if is_paca or len(self.methods) < 2 else None
        setting = Setting(**values)
        if len(self.methods) > 1 and not setting.row.has_dropout:
            return setting
        return setting.but(dropout=self.dropout or setting.dropout)

    def about(self) -> str:
        """Return the sizes that all methods have; `train`'s where none is given."""
        if self.max is not None:
            return f"the largest {self.max} that fits"
        sizes = f"batch {self.batch_size} x {self.seq_len:,} tokens"
        usual = EstimateCommand.batch_size, EstimateCommand.seq_len, None
        if (self.batch_size, self.seq_len, self.rank) == usual:
            sizes += " and the rank that `pacatune train` has by default"
        return sizes

    def run(self) -> int:
        """Do it."""
        quiet_libraries()

        from pacatune.measure.device import gpu_bytes, parse_bytes
        from pacatune.measure.models import load_config

        settings = {name: self.setting(name) for name in self.methods or [self.method or "paca"]}
        available = None if self.memory is None else parse_bytes(self.memory)
        if self.gpu is not None:
            available = gpu_bytes(self.gpu)
        load_config(self.model)  # refuses a wrong one before PEFT is imported, which takes seconds

        from pacatune.measure.estimate import estimate_memory, find_max

        estimates: dict[str, Estimate] = {}
        values: dict[str, Values] = {name: {} for name in settings}
        for name, setting in settings.items():
            facts, estimate = values[name], None
            if self.max is None or available is None:
                estimate = estimate_memory(setting)
            else:
                quantity = _QUANTITIES[self.max]
                facts[f"max_{quantity}"], estimate = find_max(setting, quantity, available)
            facts |= {"notes": []} if estimate is None else estimate.to_values()
            if available is not None:
                facts["available_bytes"] = available
                facts["fits"] = "no" if estimate is None else estimate.fits(available)
            if estimate is not None:
                estimates[name] = estimate
        if self.json:
            first = next(iter(values.values()))
            print(json.dumps({"methods": values} if self.methods else first, indent=2))
        else:
            _print_memory(values, estimates, self.model, self.about())
        return 0


command = EstimateCommand


def _print_memory(
    values: dict[str, Values], estimates: "dict[str, Estimate]", model: str, sizes: str
) -> None:
    from pacatune.reports.rows import table

    if estimates:
        rows = [row for name, estimate in estimates.items() for row in estimate.rows(name)]
        lines = table(rows, ("setting",), ("method",)).plain()
        print(f"{model}: memory at the peak of a step, simulated; {sizes}", *lines, sep="\n")
        print(_NEEDS)
    for name, facts in values.items():
        estimate = estimates.get(name)
        print(f"\n{name}{'' if estimate is None else f': {estimate.setting.about()}'}")
        for quantity in _QUANTITIES.values():
            if f"max_{quantity}" in facts:
                print(f"  largest {quantity}: {facts[f'max_{quantity}']:,}")
        if "fits" in facts:
            print(f"  fits in {_gib(facts['available_bytes'])} GiB: {_fits(facts)}")
        if estimate is not None:
            saved = estimate.saved_by_module.items()
            parts = ", ".join(f"{kind} {_gib(number)}" for kind, number in saved if number > 2**20)
            print(f"  keeps for backward, GiB: {parts or 'nothing'}")
    print_notes(dict.fromkeys(note for facts in values.values() for note in facts["notes"]))


def _fits(facts: Values) -> str:
    fits, available = str(facts["fits"]), facts["available_bytes"]
    if fits == "yes" or "device_bytes" not in facts:
        return fits
    over = {end: _gib(number - available) for end, number in facts["device_bytes"].items()}
    by = over["low"] if fits == "no" else f"up to {over['high']}"
    return f"{fits}, over by {by} GiB"


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.2f}"
