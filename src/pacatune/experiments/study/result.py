"""What a study found: one record per run, one result per arm, and the whole."""

from dataclasses import asdict, dataclass, field
from typing import Any

METRICS = {"loss": False, "accuracy": True}
"""Metric -> whether more is better."""


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """One run: an arm at one learning rate with one seed."""

    key: str
    """Hash of all that decides the numbers."""
    arm: str
    learning_rate: float
    seed: int
    validation: dict[str, float] = field(default_factory=dict)
    """Metric -> value on the data that rates are chosen by."""
    test: dict[str, float] = field(default_factory=dict)
    """Metric -> value on the data that is reported."""
    forgetting: dict[str, float] = field(default_factory=dict)
    """Loss on general text, `before` and `after`; empty where it was not measured."""
    num_trainable_parameters: int = 0
    train_loss: float | None = None
    num_steps: int = 0
    seconds: float = 0.0
    """Time of the run, for planning only: other programs may have been running."""
    versions: dict[str, str] = field(default_factory=dict)
    error: str | None = None
    """Why it failed; None if it did not."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """An arm against the reference, over the seeds that both have."""

    mean: float
    """Mean of the differences by seed, arm minus reference, in the metric's own unit."""
    std: float | None
    """Their standard deviation (n - 1); None with one seed."""
    p_value: float
    """Exact two-sided sign-flip permutation test."""
    smallest_p_value: float
    """The least that the test can give with so many seeds, 2 / 2^n."""
    num_seeds: int


@dataclass(frozen=True, kw_only=True)
class ArmResult:
    """What an arm reached at its best learning rate, on test data."""

    name: str
    method: str
    rank: int | None
    learning_rate: float | None
    """Chosen on validation data; None if no rate worked with every seed that chooses."""
    values: dict[int, float]
    """Seed -> metric."""
    mean: float | None
    std: float | None
    """Standard deviation over seeds (n - 1); None with fewer than two."""
    num_trainable_parameters: int
    forgetting: float | None
    """Mean rise of the loss on general text."""
    rates: dict[float, float | None]
    """Learning rate -> mean metric on validation data, None where a run failed."""
    at_edge: bool
    """Whether the best rate is the smallest or largest of several, so that a better one may lie
    outside the grid."""
    comparison: Comparison | None
    """None for the reference."""
    failures: list[str]


@dataclass(frozen=True, kw_only=True)
class StudyResult:
    """A finished study, or what there is of one."""

    metric: str
    higher_is_better: bool
    reference: str
    arms: dict[str, ArmResult]
    warnings: list[str]
    config: dict[str, Any]
    versions: dict[str, str]

    def to_dict(self) -> dict[str, Any]:
        """Return what study.json holds."""
        return asdict(self)
