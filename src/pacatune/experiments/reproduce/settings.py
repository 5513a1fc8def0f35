"""The settings of our own runs, in the words of the paper's tables; and which differ."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Literal

from pacatune.measure.setting import BenchConfig
from pacatune.methods import METHODS
from pacatune.paper.settings import MODULES, SCRIPTS, Settings
from pacatune.reports.tables import ReportTable

if TYPE_CHECKING:
    from pacatune.experiments.reproduce.experiment import Experiment


@dataclass(frozen=True, kw_only=True)
class SettingsBeside:
    """The settings of one line of the paper beside those of a run of ours."""

    title: str
    """Title of the line."""
    paper: Settings
    ours: Settings
    why: Mapping[str, str]
    """Name of a setting that differs, or that the paper leaves out -> why ours is what it is."""
    commands: tuple[str, ...] = ()
    """What runs, one line of a shell each."""


def of_bench(config: BenchConfig, method: str) -> Settings:
    """Return what `pacatune bench` measures of a method, in its first setting."""
    is_sweep = config.sweep is not None
    first = config.settings[0]
    return Settings(
        model=config.title,
        rank=config.rank if METHODS[method].has_adapter else None,
        precision="16 bits" if config.dtype != "float32" else "32 bits",
        optimizer="AdamW",
        batch_size=None if config.sweep == "batch" else (1 if is_sweep else first.num_rows),
        seq_len=None if config.sweep == "seq-len" else config.seq_len,
        dropout=None if METHODS[method].dropout is None else config.dropout,
        target_modules=MODULES,
    )


def of_run(run: Any, data: str, rates: tuple[float, ...] | None) -> Settings:
    """Return the settings of a RunConfig, whose learning rate is one of several that are tried."""
    arguments = run.training
    is_paca = METHODS[run.method].is_paca
    adapter = run.paca if is_paca else run.lora
    micro_batches = int(arguments.gradient_accumulation_steps)
    return Settings(
        model=run.model.path,
        data=data,
        rank=adapter.r,
        alpha=float(adapter.paca_alpha if is_paca else adapter.lora_alpha),
        dropout=None if is_paca else adapter.lora_dropout or None,
        learning_rates=rates,
        precision="16-bit mixed" if arguments.bf16 else "32 bits",
        optimizer="AdamW",
        scheduler=str(getattr(arguments.lr_scheduler_type, "value", arguments.lr_scheduler_type)),
        batch_size=int(arguments.per_device_train_batch_size) * micro_batches,
        micro_batches=micro_batches,
        seq_len=arguments.max_length,
        warmup=float(arguments.given["warmup_steps"]),
        epochs=None if arguments.max_steps > 0 else float(arguments.num_train_epochs),
        steps=arguments.max_steps if arguments.max_steps > 0 else None,
        target_modules=tuple(adapter.target_modules or MODULES),  # the blocks' layers
    )


def differences(beside: SettingsBeside) -> dict[str, tuple[Any, Any]]:
    """Return the settings that are not the same: name -> the paper's and ours."""
    pairs = {
        f.name: (getattr(beside.paper, f.name), getattr(beside.ours, f.name))
        for f in fields(Settings)
    }
    return {
        name: (paper, ours)
        for name, (paper, ours) in pairs.items()
        if paper != ours
        and not (name == "target_modules" and paper and ours and set(paper) == set(ours))
    }


def beside_table(beside: SettingsBeside) -> ReportTable:
    """Return every setting of the paper or of ours, and why those differ that do."""
    different = differences(beside)
    rows = []
    for field in fields(Settings):
        paper, ours = (getattr(one, field.name) for one in (beside.paper, beside.ours))
        if paper is None and ours is None:
            continue
        reason = beside.why.get(field.name, "") if field.name in different else "same"
        rows.append([field.name.replace("_", " "), _text(paper), _text(ours), reason])
    header = ["setting", "paper", "ours", "why it differs"]
    return ReportTable(title=beside.title, header=header, rows=rows, align="l")


def settings_text(experiment: "Experiment", scale: Literal["small", "full"]) -> str:
    """Return all settings of an experiment beside the paper's, as Markdown."""
    lines = [f"# {experiment.name}: {experiment.title} ({experiment.place}); --scale {scale}"]
    if experiment.name in SCRIPTS:
        lines += ["", SCRIPTS[experiment.name]]
    for beside in experiment.settings(scale):
        table = beside_table(beside)
        lines += ["", f"## {table.title}", "", *table.lines()]
        if beside.commands:
            lines += ["", *(f"    {command}" for command in beside.commands)]
    return "\n".join(lines) + "\n"


def _text(value: Any) -> str:
    if value is None:
        return "not said"
    if isinstance(value, tuple):
        return ", ".join(map(_text, value))
    return f"{value:g}" if isinstance(value, float) else str(value)
