"""What tells one kind of run from another: its data, model, trainer and metrics.

The recipe does the rest. A new kind is a subclass of `ReportedTask`, and one of `BaseRunConfig`
that names it.
"""

import importlib
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

from pacatune.training.config import BaseRunConfig
from pacatune.training.plan import Plan

if TYPE_CHECKING:
    from peft import PeftConfig
    from torch import Tensor, nn

    from pacatune.training.report import RunReport

C = TypeVar("C", bound=BaseRunConfig[Any])
"""Configuration of a task's runs."""


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """What is known before the weights are loaded."""

    train: Any
    """Training examples, as the trainer takes them; they have a length."""
    evaluation: Any | None
    """Held-out examples of the same kind."""
    fingerprint: str
    """Digest of the training data, by which a resumed run knows that it is the same."""
    about_data: str
    """One line for the user."""
    adapter_config: "PeftConfig | None"
    plan: Plan
    model: str
    """Hub id, or absolute path of the model's folder."""
    dtype: str
    """Name of the type that the weights are held in."""
    warnings: list[str] = field(default_factory=list)
    """What looks wrong with data or model."""


class Task(ABC, Generic[C]):
    """One run of a kind; it keeps what it has found out about data and model.

    The recipe calls `prepare`, `load_model` and `make_trainer`, in this order.

    Args:
        config: The run.
    """

    unit: ClassVar[str]
    """What is trained on and counted, such as `tokens`."""
    less_memory: ClassVar[str]
    """Options that save memory, for the message when there is too little."""
    loss: Callable[[Any, Any], "Tensor"] | None = None
    """Loss of a model on a batch of `collate`, by which columns are chosen; the model's own where
    None."""

    def __init__(self, config: C) -> None:
        self.config = config

    @abstractmethod
    def plan(self) -> Plan:
        """Say what would be trained, with no weight and no more data than that takes.

        Raises:
            ValueError: If the model or its targets do not suit the method.
        """

    @abstractmethod
    def prepare(self) -> Prepared:
        """Read the data, and all there is to know about the model without its weights.

        Raises:
            ValueError: If the options, the data and the model do not fit together.
        """

    @abstractmethod
    def load_model(self) -> "nn.Module":
        """Load the weights of the base; what is new in it is drawn from torch's generator."""

    @abstractmethod
    def collate(self, examples: Any, places: list[int]) -> Any:
        """Return the training examples at some places as one batch."""

    @abstractmethod
    def make_trainer(
        self, model: "nn.Module", adapter_config: "PeftConfig | None", **options: Any
    ) -> Any:
        """Put the adapter on the model, and return a trainer whose class begins with RunTrainer.

        Args:
            model: What `load_model` returned.
            adapter_config: With the columns chosen, where data decides about them.
            **options: For the trainer: `meter`, `args`, `train_dataset`, `eval_dataset` and
                `callbacks`.
        """


class ReportedTask(Task[C]):
    """A task whose runs are saved and reported: those that `train` does.

    After training it calls `evaluate`, `make_report`, `write` and `how_to_load`, in this order.
    """

    pipeline_tag: ClassVar[str]
    """The hub's name of the task."""
    tags: ClassVar[tuple[str, ...]] = ()
    """Tags of the model card, beside the method's."""

    def evaluate(self, trainer: Any) -> dict[str, Any]:
        """Evaluate what will be saved, where there is data for it; return entries of the report.

        It may be the best checkpoint and not the last weights.
        """
        return {"eval_loss_after": float(trainer.evaluate()["eval_loss"])}

    @abstractmethod
    def make_report(
        self, known: dict[str, Any], trainer: Any, items_per_second: float
    ) -> "RunReport":
        """Return the report.

        Args:
            known: Entries that every report has, and those of `evaluate`.
            trainer: After training.
            items_per_second: Speed, in `unit`.
        """

    def write(self, report: "RunReport", folder: Path) -> None:
        """Write what goes with the weights, beside report and card."""

    @abstractmethod
    def how_to_load(self, report: "RunReport") -> str:
        """Return what the model card says about loading the result, as Markdown."""


def task_of(config: BaseRunConfig[Any]) -> Task[Any]:
    """Return the task of a run."""
    module, _, name = config.task.partition(":")
    made: Task[Any] = getattr(importlib.import_module(module), name)(config)
    return made
