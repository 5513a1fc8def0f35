"""Reports of tasks that are judged by more than a loss: margins, accuracies, rewards."""

from dataclasses import dataclass, field
from typing import Any, ClassVar

from pacatune.training.report import Curve, Report, curve_of, four_digits

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
class MetricReport(Report):
    """Results of a run with metrics beside the loss."""

    shown: ClassVar[dict[str, str]]
    """Held-out metric -> what the table calls it."""

    train_metrics: dict[str, Curve] = field(default_factory=dict)
    """Metric of training, by TRL's name -> (step, mean since the last point)."""
    eval_metrics: dict[str, Curve] = field(default_factory=dict)
    """Held-out metric, by TRL's name -> (step, value)."""
    eval_metrics_after: dict[str, float] = field(default_factory=dict)
    """Held-out metrics of what was saved."""

    def outcome(self) -> list[tuple[str, str]]:
        """Return the loss, and the metrics before and after."""
        return [*super().outcome(), *self._metric_rows()]

    def _metric_rows(self) -> list[tuple[str, str]]:
        rows = []
        for name, title in self.shown.items():
            curve = self.eval_metrics.get(name)
            rows.append((f"{title} before", four_digits(curve[0][1] if curve else None)))
            rows.append((f"{title} after", four_digits(self.eval_metrics_after.get(name))))
        return rows


@dataclass(kw_only=True)
class PreferenceReport(MetricReport):
    """Results of a run on pairs of answers."""

    loss_per: ClassVar[str] = "pair"
    shown: ClassVar[dict[str, str]] = {
        "rewards/margins": "held-out reward margin",
        "rewards/accuracies": "held-out accuracy",
    }


@dataclass(kw_only=True)
class JudgedReport(MetricReport):
    """Results of a run on judged answers."""

    loss_per: ClassVar[str] = "answer"
    shown: ClassVar[dict[str, str]] = {"rewards/margins": "held-out reward margin"}


@dataclass(kw_only=True)
class RewardModelReport(MetricReport):
    """Results of a run of a reward model."""

    loss_per: ClassVar[str] = "pair"
    shown: ClassVar[dict[str, str]] = {
        "margin": "held-out margin",
        "accuracy": "held-out accuracy",
    }


@dataclass(kw_only=True)
class RlReport(MetricReport):
    """Results of a run of reinforcement learning."""

    figure: ClassVar[str] = "reward.png"
    shown: ClassVar[dict[str, str]] = {
        "reward": "held-out reward",
        "completions/mean_length": "tokens per answer",
    }

    def outcome(self) -> list[tuple[str, str]]:
        """Return rewards before and after; the loss says nothing of them."""
        return self._metric_rows()

    def plotted(self) -> tuple[str, Curve, Curve]:
        """Return rewards instead of losses."""
        name = "reward"
        return "mean reward", self.train_metrics.get(name, []), self.eval_metrics.get(name, [])


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
