"""What a run achieved: report.json, report.md, loss.png, and README.md, the model card."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

import yaml

from pacatune.files.folder import format_bytes
from pacatune.methods import METHODS
from pacatune.reports.figures import new_figure, save_figure
from pacatune.reports.rows import Table
from pacatune.training.config_file import without_folders
from pacatune.training.tasks import TASKS, TaskSpec

if TYPE_CHECKING:
    from pacatune.training.language import Task

Curve = list[tuple[int, float]]


_OF_METRICS = ("train_metrics", "eval_metrics", "eval_metrics_after")
# Entries of the trainer's log that are no metrics of the task.
_NOT_METRICS = (
    "step",
    "epoch",
    "loss",
    "grad_norm",
    "learning_rate",
    "total_flos",
    "num_tokens",
    "step_time",
    "runtime",
    "samples_per_second",
    "steps_per_second",
)


@dataclass(kw_only=True)
class Report:
    """Results of one run."""

    task: str
    """Name of what was done; not saved, since the configuration has it."""
    eval_loss_before: float | None = None
    """Held-out loss before the first step; None without evaluation data."""
    eval_loss_after: float | None = None
    """Held-out loss of what was saved."""
    train_loss: float | None
    """Mean over all steps."""
    num_trainable_parameters: int
    step_ms: float | None
    """Median time of an optimizer step."""
    peak_memory_bytes: int
    saved_activation_bytes: int | None
    """Kept for backward by the first micro-batch, weights aside; None where they are sharded."""
    lean: dict[str, Any] | None = None
    """What was made lean (`made`), was already, and was `left`, with reasons; None: `lean` off."""
    seed: int
    versions: dict[str, str]
    targets: list[str]
    """Names of the adapted modules; empty where every weight, or the head, is trained."""
    method: str
    model: str
    adapter: str | None = None
    """Adapter that training started from."""
    num_parameters: int
    num_steps: int
    num_train_examples: int
    num_eval_examples: int
    device: str
    dtype: str
    """Format of the weights that are not quantised."""
    compute_dtype: str
    """Format of the products: with mixed precision another than `dtype`."""
    columns: str | None = None
    """How the trained columns were chosen; None for other methods than PaCA."""
    quantization: str | None = None
    """How the frozen weights were held, such as nf4; None: in `dtype`."""
    learning_rate: float
    peak_memory_kind: str
    """`cuda_max_memory_allocated` or `process_peak_resident`."""
    train_losses: Curve = field(default_factory=list)
    """(step, mean loss since the last point)."""
    eval_losses: Curve = field(default_factory=list)
    """(step, loss)."""
    warnings: list[str] = field(default_factory=list)
    """What was found in the data, and whether the loss rose."""

    tokens_per_second: float
    """Tokens that are not padding, of all processes, per second of steps."""
    train_metrics: dict[str, Curve] | None = None
    """Metric of training beside the loss, by the trainer's name -> (step, mean since the last
    point); None of tasks without."""
    eval_metrics: dict[str, Curve] | None = None
    """Held-out metric -> (step, value)."""
    eval_metrics_after: dict[str, float] | None = None
    """Held-out metrics of what was saved."""

    def to_dict(self) -> dict[str, Any]:
        """Return what report.json holds: nothing of what the task has not."""
        of_metrics = () if self.spec.metrics else _OF_METRICS
        return {k: v for k, v in asdict(self).items() if k not in ("task", *of_metrics)}

    @property
    def spec(self) -> TaskSpec:
        """The row of the table of tasks."""
        return TASKS[self.task]

    @property
    def figure(self) -> str:
        """File with the curves."""
        return "reward.png" if self.spec.is_rewarded else "loss.png"

    def table(self) -> list[tuple[str, str]]:
        """Return the results as pairs of text."""
        share = self.num_trainable_parameters / max(self.num_parameters, 1)
        step = "-" if self.step_ms is None else f"{self.step_ms:,.1f} ms"
        saved = self.saved_activation_bytes
        computed = f", computed in {self.compute_dtype}" * (self.compute_dtype != self.dtype)
        return [
            *self.outcome(),
            ("trained parameters", f"{self.num_trainable_parameters:,} ({share:.3%})"),
            ("time per step (median)", step),
            ("tokens per second", f"{self.tokens_per_second:,.0f}"),
            (f"peak memory ({self.peak_memory_kind})", format_bytes(self.peak_memory_bytes)),
            ("kept for backward", "-" if saved is None else format_bytes(saved)),
            ("lean activations", _lean(self.lean)),
            *([("columns", self.columns)] if self.columns else []),
            *([("started from", self.adapter)] if self.adapter else []),
            ("steps", f"{self.num_steps:,}"),
            ("examples", f"{self.num_train_examples:,} + {self.num_eval_examples:,} held out"),
            ("device, weights", f"{self.device}, {self.quantization or self.dtype}{computed}"),
            ("learning rate, seed", f"{self.learning_rate:g}, {self.seed}"),
        ]

    def outcome(self) -> list[tuple[str, str]]:
        """Return the rows of the table that say what was reached."""
        rows = [
            ("held-out loss before", four_digits(self.eval_loss_before)),
            ("held-out loss after", four_digits(self.eval_loss_after)),
            ("training loss", four_digits(self.train_loss)),
        ]
        rows = [] if self.spec.is_rewarded else rows
        for name, title in self.spec.metrics.items():
            curve, after = (self.eval_metrics or {}).get(name), self.eval_metrics_after or {}
            rows.append((f"{title} before", four_digits(curve[0][1] if curve else None)))
            rows.append((f"{title} after", four_digits(after.get(name))))
        return rows

    def risen(self) -> list[str]:
        """Return one line if the loss ended above its start, else none.

        The held-out loss decides, where there is one. The training losses are of other examples in
        each step: the mean of the last tenth must be half as high again as that of the first.
        """
        losses = [loss for _, loss in self.train_losses]
        tenth = max(1, len(losses) // 10)
        which, start, end, least = "held-out", self.eval_loss_before, self.eval_loss_after, 1.01
        if start is None and losses:
            which, least = "training", 1.5
            start, end = fmean(losses[:tenth]), fmean(losses[-tenth:])
        if self.spec.is_rewarded or start is None or end is None or end <= least * start:
            return []
        return [
            f"the {which} loss rose from {start:.4f} to {end:.4f}: lower "
            f"`training.learning_rate` ({self.learning_rate:g})."
        ]

    def plotted(self) -> tuple[str, Curve, Curve]:
        """Return what the figure shows: its name, its curve in training and the held-out one."""
        if not self.spec.is_rewarded:
            return f"loss per {self.spec.loss_per}", self.train_losses, self.eval_losses
        train, held_out = self.train_metrics or {}, self.eval_metrics or {}
        return "mean reward", train.get("reward", []), held_out.get("reward", [])


def write_report(report: Report, folder: Path) -> None:
    """Write report.json, report.md and the figure into `folder`."""
    text = json.dumps(report.to_dict(), indent=2, ensure_ascii=False)
    (folder / "report.json").write_text(text + "\n", encoding="utf-8")
    (folder / "report.md").write_text(_markdown(report), encoding="utf-8")
    _plot(report, folder / report.figure)


def card_front(task: "Task", model: str) -> str:
    """Return what the hub reads of a card; a model in a folder is left out, as none of its."""
    method, tags = METHODS[task.config.method], getattr(task.trainer_class, "_tag_names", ())
    front = {
        "base_model": model,
        "library_name": "peft" if method.has_adapter else "transformers",
        "pipeline_tag": task.kind.pipeline_tag,
        "tags": sorted({task.config.method, "pacatune", *tags}),
    }
    if Path(task.config.model.path).expanduser().exists():
        del front["base_model"]
    return f"---\n{yaml.safe_dump(front, sort_keys=False)}---\n\n"


def write_card(task: "Task", report: Report, folder: Path) -> None:
    """Write README.md: what the result is, how to load it, how it was made."""
    config = task.config
    name = METHODS[config.method].title
    if report.quantization and not name.startswith("Q"):
        name = f"Q{name}"
    settings = f"`config.yaml`, which `{config.repeat_command('config.yaml')}` repeats"
    text = (
        f"{card_front(task, report.model)}"
        f"# {name} fine-tuning of {Path(report.model).name}\n\n"
        f"{task.how_to_load(report)}\n"
        f"## Training\n\n"
        f"Data: {config.data.about()} ({report.num_train_examples:,} examples, "
        f"{report.num_eval_examples:,} held out). "
        f"Settings: {settings}. "
        f"Details: [report.md](report.md), [report.json](report.json).\n\n"
        f"{_table(report)}\n\n{_warnings(report)}![Curves]({report.figure})\n"
    )
    (folder / "README.md").write_text(without_folders(text, config), encoding="utf-8")


def train_curve(log: list[dict[str, Any]]) -> tuple[Curve, float | None]:
    """Return the logged training losses and their mean over all steps.

    Each loss in the trainer's log is the mean since the one before it.
    """
    curve = curve_of(log, "loss")
    starts = [0, *(step for step, _ in curve)]
    total = sum((step - start) * loss for start, (step, loss) in zip(starts, curve, strict=False))
    return curve, total / curve[-1][0] if curve else None


def curve_of(log: list[dict[str, Any]], name: str) -> Curve:
    """Return what the trainer's log says of a metric, one value per step."""
    curve = {int(e["step"]): float(e[name]) for e in log if e.get(name) is not None}
    return sorted(curve.items())


def metrics_of(log: list[dict[str, Any]], prefix: str = "") -> dict[str, Curve]:
    """Return the metrics of a trainer's log: held-out ones with the prefix `eval_`, or the others.

    Each is under its name without the prefix.
    """
    others = ("eval_", "train_")
    names = dict.fromkeys(
        name.removeprefix(prefix)
        for entry in log
        for name in entry
        if (name.startswith(prefix) if prefix else not name.startswith(others))
    )
    curves = {name: curve_of(log, prefix + name) for name in names if name not in _NOT_METRICS}
    return {name: curve for name, curve in curves.items() if curve}


def _lean(report: dict[str, Any] | None) -> str:
    if report is None:
        return "off"
    lean = ", ".join(f"{len(names)} x {kind}" for kind, names in report["made"].items())
    if lean and report.get("level", 1) > 1:
        lean = f"level {report['level']}: {lean}"
    left = "; ".join(f"not {names[0]}: {reason}" for reason, names in report["left"].items())
    return "; ".join(filter(None, [lean or "nothing to make lean", left]))


def four_digits(value: float | None) -> str:
    """Return a loss or a share as text."""
    return "-" if value is None else f"{value:.4f}"


def _table(report: Report) -> str:
    cells = list(map(list, report.table()))
    return "\n".join(Table(header=["", ""], cells=cells, num_index=2).markdown())


def _warnings(report: Report) -> str:
    warnings = "".join(f"- {warning}\n" for warning in report.warnings)
    return f"Warnings:\n\n{warnings}\n" if warnings else ""


def _markdown(report: Report) -> str:
    kinds = sorted({name.rpartition(".")[2] for name in report.targets})
    everything = "the head" if report.method == "head" else "every weight"
    targets = f"{len(report.targets)} modules ({', '.join(kinds)})" if kinds else everything
    packages = ", ".join(f"{name} {number}" for name, number in report.versions.items())
    return (
        f"# {report.method} on {report.model}\n\n{_table(report)}\n\n"
        f"Trained: {targets}.\n\n![Curves]({report.figure})\n\n"
        f"{_warnings(report)}Versions: {packages}.\n"
    )


def _plot(report: Report, path: Path) -> None:
    name, train, held_out = report.plotted()
    figure = new_figure(7, 4)
    axes = figure.add_subplot()
    if train:
        axes.plot(*zip(*train, strict=True), label="training", linewidth=1)
    if held_out:
        axes.plot(*zip(*held_out, strict=True), "o-", label="held out")
    axes.set(xlabel="step", ylabel=name, title=report.method)
    if train or held_out:
        axes.legend()
    axes.grid(alpha=0.3)
    save_figure(figure, path)
