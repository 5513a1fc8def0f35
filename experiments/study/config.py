"""A study, declared once: methods ("arms") on one task, each at its best learning rate."""

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from pacatune.methods import METHODS, method_of, size_options
from pacatune.names import check_choices, choose
from pacatune.training.config_file import check_keys, read_values

Values = dict[str, Any]


@dataclass(kw_only=True)
class Arm:
    """One of the methods that are compared."""

    method: str = "paca"
    """Any that the command takes."""

    rank: int | None = None
    """Rank of the adapter; every method that has one needs it."""

    alpha: int | None = None
    """Scale of the update, alpha / rank; the rank where null, so that nothing is scaled."""

    learning_rates: list[float] | None = None
    """Grid of learning rates; the study's for the method where null."""

    options: Values = field(default_factory=dict)
    """Further options of this arm's runs, in sections as in a configuration of the command."""

    def __post_init__(self) -> None:
        method = method_of(self.method)
        self.method = method.name
        if (self.rank is None) == method.has_adapter:
            rule = "needs a rank" if method.has_adapter else "has none"
            raise ValueError(f"`rank` ({self.rank}): {self.method!r} {rule}.")
        if self.alpha is not None and not method.has_scale:
            raise ValueError(f"`alpha` ({self.alpha}): {self.method!r} has none; drop it.")

    def run_options(self) -> Values:
        """Return the options of its runs: method, size of the adapter, and what it says itself."""
        method, options = METHODS[self.method], {"method": self.method}
        if self.rank is not None:
            alpha = self.rank if self.alpha is None else self.alpha
            options[method.sections[0]] = size_options(method, self.rank, alpha)
        return merged(options, self.options)


@dataclass(kw_only=True)
class StudyConfig:
    """A comparison of methods on one task.

    Each arm trains at each rate of its grid with the first `tuning_seeds` seeds. The rate with the
    least mean loss on validation data is taken, and all seeds train at it. What is reported is
    measured on test data, which choose nothing.
    """

    task: str = ""
    """Path of a configuration of `command`; empty if `options` says it all."""

    command: Literal["train", "classify", "images"] = "train"
    """What the configuration is one of; `classify` is `train --task classifier`, `images` is of
    `experiments.study.images`."""

    options: Values = field(default_factory=dict)
    """Options of all runs, in sections; over the task's."""

    arms: dict[str, Arm] = field(default_factory=dict)
    """Name -> arm; the others are compared with the first."""

    metric: Literal["auto", "loss", "accuracy", "exact_match"] = "auto"
    """What is reported; auto: accuracy where there are classes, else the loss. exact_match: the
    share of answers that a language model gives token by token."""

    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    """Seeds of the order of the data, the columns, and whatever starts at random."""

    tuning_seeds: int = 1
    """How many of the seeds, from the first, choose the learning rate."""

    learning_rates: dict[str, list[float]] = field(default_factory=dict)
    """Method -> grid, for arms without one."""

    extend_grids: int = 0
    """Where the best rate is at the edge of its grid, try the next one beyond, so many times."""

    validation_fraction: float = 0.1
    """Share of the training data that is held out to choose by; the task's evaluation data is the
    test."""

    forgetting_tokens: int = 2048
    """Tokens of general text whose loss is measured before and after; 0: none."""

    unrelated: str = ""
    """Data of another task, as `data.eval_path` of `train`, whose loss is measured before and
    after as well."""

    rewind: list[float] = field(default_factory=list)
    """Shares of the trained update, above 0 and below 1, with which adapters are tested too."""

    def __post_init__(self) -> None:
        check_choices(self)
        if not self.task and not self.options:
            raise ValueError("`task` is ''; name a configuration's path.")
        if not self.arms:
            raise ValueError("`arms` is empty; name at least one, such as paca: {rank: 8}.")
        if len(set(self.seeds)) < len(self.seeds) or not 1 <= self.tuning_seeds <= len(self.seeds):
            raise ValueError(
                f"`seeds` ({self.seeds}) must be different, and at least `tuning_seeds` "
                f"({self.tuning_seeds}) of them."
            )
        if not all(0 < share < 1 for share in (*self.rewind, self.validation_fraction)):
            raise ValueError(
                f"`validation_fraction` ({self.validation_fraction}) and the shares of `rewind` "
                f"({self.rewind}) must be above 0 and below 1."
            )
        for method in self.learning_rates:
            choose(method, METHODS, option="learning_rates")
        for name in self.arms:
            self.rates_of(name)

    def rates_of(self, name: str) -> list[float]:
        """Return the grid of an arm."""
        arm = self.arms[name]
        rates = arm.learning_rates or self.learning_rates.get(arm.method) or []
        if not rates or len(set(rates)) < len(rates) or min(rates) <= 0:
            raise ValueError(
                f"arm {name!r}: `learning_rates` ({rates}) must be different numbers above 0, at "
                "least one."
            )
        return sorted(rates)


def read_study(path: Path) -> StudyConfig:
    """Read a study from YAML; paths in it are taken as they are, from where the command runs."""
    values = read_values(path)
    check_keys(values, {each.name for each in fields(StudyConfig)}, str(path))
    options_of_arm = {each.name for each in fields(Arm)}
    arms = {}
    for name, options in (values.pop("arms", None) or {}).items():
        check_keys(options, options_of_arm, f"{path}, arm {name!r}")
        arms[name] = Arm(**options)
    return StudyConfig(arms=arms, **values)


def merged(base: Values, over: Values) -> Values:
    """Return options with others over them, section by section; neither is changed."""
    result = dict(base)
    for key, value in over.items():
        is_section = isinstance(value, dict) and isinstance(base.get(key), dict)
        result[key] = {**base[key], **value} if is_section else value
    return result
