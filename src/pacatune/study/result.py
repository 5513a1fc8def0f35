"""What a study found: a file for each run that has ended, a result for each arm, and the whole."""

import json
import re
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from pacatune.files.owned_folder import OwnedFolder
from pacatune.study.statistics import Comparison

RUNS_NAME = "runs"
_KEY_IN_NAME = re.compile(r"-([0-9a-f]{24})\.json$")


def study_folder(folder: Path) -> OwnedFolder:
    """Return the folder of a study's results."""
    return OwnedFolder(path=folder, kind="a study")


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What one run reached; nothing where it failed."""

    validation: dict[str, float] = field(default_factory=dict)
    """Metric -> value on the data that rates are chosen by."""
    test: dict[str, float] = field(default_factory=dict)
    """Metric -> value on the data that is reported."""
    forgetting: dict[str, float] = field(default_factory=dict)
    """Loss on general text, `before` and `after`; empty where it was not measured."""
    num_trainable_parameters: int = 0
    train_loss: float | None = None
    num_steps: int = 0
    step_ms: float | None = field(default=None, compare=False)
    """Median time of a step; other programs may have been running."""
    saved_activation_bytes: int | None = None
    """What the first batch kept for the backward pass."""


@dataclass(frozen=True, kw_only=True)
class RunRecord(Measured):
    """One run: an arm at one learning rate with one seed."""

    key: str
    """Hash of all that decides the numbers."""
    arm: str
    learning_rate: float
    seed: int
    seconds: float
    """Time of the run, for planning only: other programs may have been running."""
    versions: dict[str, str]
    error: str | None = None
    """Why it failed; None if it did not."""


class Records:
    """The records in a study's folder, by key, each written whole or not at all."""

    def __init__(self, folder: OwnedFolder) -> None:
        self._folder = folder
        files = sorted((folder.path / RUNS_NAME).glob("*.json"))
        self._files = {match[1]: f for f in files if (match := _KEY_IN_NAME.search(f.name))}

    def find(self, key: str) -> RunRecord | None:
        """Return the record of a run, failed or not; None if it never ended."""
        path = self._files.get(key)
        if path is None:
            return None
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            known = {f.name for f in fields(RunRecord)} & values.keys()  # fewer in an older version
            return RunRecord(**{name: values[name] for name in known})
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path} is no record of a run ({type(error).__name__}: {error}); delete it, and "
                "the run is done again."
            ) from error

    def write(self, record: RunRecord) -> None:
        """Write a record, in the place of an earlier one of the same run."""
        name = f"{record.arm}-{record.learning_rate:g}-seed{record.seed}-{record.key}.json"
        path = self._folder.path / RUNS_NAME / name
        self._folder.write_json(f"{RUNS_NAME}/{name}", asdict(record), edited=False)
        older = self._files.get(record.key)
        if older is not None and older != path:
            self._folder.remove(f"{RUNS_NAME}/{older.name}")
        self._files[record.key] = path


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
    step_ms: float | None = None
    """Median over runs of the median time of a step; other programs may have been running."""
    saved_activation_bytes: float | None = None
    """Median over runs of what the first batch kept for the backward pass."""


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

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "StudyResult":
        """Return the result that `to_dict` gave, also after JSON made texts of its numbers."""
        values = {f.name: values[f.name] for f in fields(cls)}
        arms = {name: _arm_from_dict(arm) for name, arm in values["arms"].items()}
        return cls(**values | {"arms": arms})


def _arm_from_dict(values: dict[str, Any]) -> ArmResult:
    compared = values["comparison"]
    numbers = {
        "values": {int(seed): value for seed, value in values["values"].items()},
        "rates": {float(rate): value for rate, value in values["rates"].items()},
        "comparison": None if compared is None else Comparison(**compared),
    }
    return ArmResult(**values | numbers)
