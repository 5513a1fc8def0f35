"""What a study trains and evaluates: a task with its data split in three."""

import copy
import gc
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import torch
from rich.console import Console

from pacatune.methods import readers_of
from pacatune.training.config import ADAPTER_SECTIONS, BaseRunConfig
from pacatune.training.config_file import check_keys, option_parser
from pacatune.training.recipe import make_trainer, prepare, run_trainer
from pacatune.training.report import train_curve
from pacatune.training.task import Task, count_trainable, task_of

Values = dict[str, Any]

# A run of a study is measured once, when it has ended, and leaves nothing but the numbers.
_FIXED = {"eval_strategy": "no", "save_strategy": "no", "report_to": "none"}


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What one run reached."""

    validation: dict[str, float]
    test: dict[str, float]
    num_trainable_parameters: int
    train_loss: float | None
    num_steps: int
    forgetting: dict[str, float] = field(default_factory=dict)


class StudyTask(ABC):
    """A model and data, split into what is trained on, chosen by and reported.

    Args:
        values: Options of the base run, in sections. Its evaluation data is the test data here.
        validation_fraction: Share of the training data, held out to choose learning rates by.
        forgetting_tokens: How much general text to measure a language model's loss on.

    Raises:
        ValueError: If there is no evaluation data, or an option is unknown.
    """

    metrics: ClassVar[tuple[str, ...]]
    """What is measured; the first is that of `metric: auto`."""

    def __init__(self, values: Values, validation_fraction: float, forgetting_tokens: int) -> None:
        self.values = copy.deepcopy(values)
        self.forgetting_tokens = forgetting_tokens
        self.warnings: list[str] = []
        """What looks wrong with the data, as far as `digest` has seen it."""
        self._parsed: dict[str, Values] = {}
        self.test_options = self._take_test(self.values.setdefault("data", {}))
        if self.values.get("early_stopping_patience") is not None:
            raise ValueError(
                "`early_stopping_patience` is set, but a study trains every arm for as long; drop "
                "it."
            )
        self.values["data"]["eval_fraction"] = validation_fraction
        self.values["training"] = {**self.values.get("training", {}), **_FIXED}

    @classmethod
    @abstractmethod
    def run_class(cls) -> type[BaseRunConfig[Any]]:
        """Return the dataclass of a run."""

    @property
    def command(self) -> str:
        """Name of the command that does such runs."""
        return self.run_class().command

    @property
    def methods(self) -> tuple[str, ...]:
        """Names of the methods that the command offers."""
        return self.run_class().methods

    def default_rate(self, method: str) -> float:
        """Return the command's default learning rate of a method that it offers."""
        return self.run_class().default_rate(method)

    def _take_test(self, data: Values) -> Values:
        """Remove the evaluation data from the data section and return it as options of one.

        Raises:
            ValueError: If there is none.
        """
        path, split = data.pop("eval_path", None), data.pop("eval_split", None)
        if path is None and split is None:
            raise ValueError(
                "the task has no `data.eval_path` or `data.eval_split`; give one: it is what is "
                "reported, and the learning rate is chosen on a part of the training data."
            )
        test = {"path": path or data.get("path", ""), "eval_fraction": 0}
        return test | ({"split": split} if split is not None else {})

    @abstractmethod
    def test_data(self, task: Task[Any]) -> Any:
        """Return the test data as the trainer takes it, for a task that is prepared."""

    @abstractmethod
    def digest(self, config: Any) -> str:
        """Return what tells model and data from others of the same names; warn of the data."""

    def _warn(self, *warnings: str) -> None:
        self.warnings += [text for text in warnings if text not in self.warnings]

    def count(self, config: Any) -> int:
        """Return how many parameters a run trains, without weights; checks what it can."""
        return task_of(config).plan().num_trainable_parameters

    def run(self, config: Any, console: Console) -> Measured:
        """Train and evaluate."""
        with released():
            task = task_of(config)
            prepared = prepare(task, console)
            test = self.test_data(task)
            before = self._general_loss(task, None)
            trainer = make_trainer(task, prepared, None, console)
            trainer.args.eval_on_start = False
            run_trainer(trainer, task, None, console)
            found = {
                name: trainer.evaluate(data)
                for name, data in (("validation", prepared.evaluation), ("test", test))
            }
            general = {"before": before, "after": self._general_loss(task, trainer.model)}
            return Measured(
                **{k: {m: float(v[f"eval_{m}"]) for m in self.metrics} for k, v in found.items()},
                num_trainable_parameters=count_trainable(trainer.model),
                train_loss=train_curve(trainer.state.log_history)[1],
                num_steps=trainer.state.global_step,
                forgetting={name: value for name, value in general.items() if value is not None},
            )

    def _general_loss(self, task: Task[Any], model: Any) -> float | None:
        """Return the loss on general text, where it is measured.

        Args:
            task: A run that is prepared.
            model: The trained model; None for the base.
        """
        return None

    def make_config(self, options: Values, decided: Values | None = None) -> Any:
        """Build a run.

        Args:
            options: Over the task's.
            decided: By the study, over those; they are taken as they are.

        Raises:
            ValueError: If an option is unknown or wrong.
        """
        run_class = self.run_class()
        sections = run_class.sections()
        # What the task says of another method is for other arms.
        others = {
            name for name in ADAPTER_SECTIONS if options.get("method") not in readers_of(name)
        }
        values = merged({k: v for k, v in self.values.items() if k not in others}, options)
        text = repr(values)
        if text not in self._parsed:  # checking takes longer than all that follows
            self._parsed[text] = self._parse(values)
        parsed = merged(self._parsed[text], decided or {})
        built = {name: kind(**parsed[name]) for name, kind in sections.items()}
        return run_class(**{k: v for k, v in parsed.items() if k not in sections}, **built)

    def _parse(self, values: Values) -> Values:
        parser, known = _parser(type(self))
        check_keys(values, known, "the study's options")
        try:
            parsed: Values = parser.parse_object(values).as_dict()
        except Exception as error:  # jsonargparse's own classes of errors
            raise ValueError(f"the study's options: {error}") from error
        return parsed


def merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> Values:
    """Return options with others over them, section by section; neither is changed."""
    result = dict(copy.deepcopy(dict(base)))
    for key, value in over.items():
        # Below a section, dictionaries (columns, patterns) are values and replaced as a whole.
        is_section = isinstance(value, Mapping) and isinstance(result.get(key), Mapping)
        result[key] = {**result[key], **value} if is_section else copy.deepcopy(value)
    return result


@contextmanager
def released() -> Iterator[None]:
    """Give memory back afterwards: a model is in a cycle with its trainer."""
    try:
        yield
    finally:
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def weights_digest(path: str, revision: str | None) -> str:
    """Return the hash of a local model's weights, or the name of one of the hub."""
    return _folder_digest(path) if Path(path).is_dir() else f"{path}@{revision}"


@cache
def _folder_digest(path: str) -> str:
    from pacatune.data.packaged.packages import sha256_of

    files = sorted(p for p in Path(path).iterdir() if p.suffix in (".safetensors", ".json"))
    return " ".join(f"{p.name}:{sha256_of(p)[:16]}" for p in files)


@cache
def _parser(task_class: type[StudyTask]) -> tuple[Any, frozenset[str]]:
    parser = option_parser()
    run_class = task_class.run_class()
    sections = run_class.sections()
    parser.add_class_arguments(run_class, skip=set(sections))
    for name, section in sections.items():
        parser.add_class_arguments(section, name)
    known = {action.dest for action in parser._actions} - {"help", *sections}
    return parser, frozenset(known)
