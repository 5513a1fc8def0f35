"""One study, declared once: methods ("arms") on one task, each at its best learning rate."""

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from pacatune.methods import METHODS, method_of
from pacatune.names import choose
from pacatune.training.config_file import check_keys, option_parser, read_values

# The exact test goes through 2^n signs.
_MOST_SEEDS = 20


@dataclass(kw_only=True)
class Arm:
    """One of the methods that are compared."""

    method: str = "paca"
    """paca, qpaca (on a base in 4 bits), lora, lora_dropout, dora, shira, gralora,
    miss, oft, qlora, full (every weight) or head (of a classifier)."""

    rank: int | None = None
    """Rank of the adapter. Where null, `match` of the study decides."""

    alpha: int | None = None
    """Scale of the update, alpha / rank; the rank where null, so that nothing is scaled."""

    dropout: float = 0.0
    """On the input of LoRA's A."""

    selection: str = "random"
    """How PaCA chooses columns; see `paca.selection` of `pacatune train`."""

    learning_rates: list[float] | None = None
    """Grid of learning rates; where null, the study's for the method."""

    options: dict[str, Any] = field(default_factory=dict)
    """Further options of this arm's runs, in sections as in a configuration of the command."""

    def __post_init__(self) -> None:
        method = method_of(self.method)
        self.method = method.name
        if self.rank is not None and not method.has_adapter:
            raise ValueError(f"`rank` ({self.rank}) means nothing for {self.method!r}; drop it.")
        if self.alpha is not None and not method.has_scale:
            raise ValueError(f"`alpha` ({self.alpha}) means nothing for {self.method!r}; drop it.")
        if self.learning_rates is not None:
            check_rates("learning_rates", self.learning_rates)


@dataclass(kw_only=True)
class StudyConfig:
    """A comparison of methods on one task.

    Each arm trains at each rate of its grid with the first `tuning_seeds` seeds, and the rate with
    the best mean on validation data is taken. It then trains with all seeds at that rate. Reported
    is what they reach on test data, which nothing was chosen by.
    """

    task: str = ""
    """Path of a configuration of `command`; empty if `options` says it all."""

    command: Literal["train", "train-image", "classify"] = "train"
    """What the configuration is one of. `classify` is a study's own small recipe for classifiers of
    texts."""

    options: dict[str, Any] = field(default_factory=dict)
    """Options of all runs, in sections as in a configuration of the command; over the task's."""

    arms: dict[str, Arm] = field(default_factory=dict)
    """Name -> arm."""

    reference: str | None = None
    """Arm that the others are compared with; the first where null."""

    match: Literal["rank", "parameters"] = "rank"
    """What arms without `rank` share with the reference: its rank, or as nearly as a rank allows
    its number of trained parameters."""

    metric: Literal["auto", "loss", "accuracy", "exact_match"] = "auto"
    """What is compared; auto: accuracy where there are classes, else the loss. exact_match: the
    share of answers that a language model gives token by token."""

    choose_by: Literal["metric", "loss"] = "metric"
    """What chooses the rates, on validation data: what is compared, or the loss, of which a few
    hundred examples tell more than of answers that are right or wrong."""

    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    """Seeds of the order of the data, the columns, and whatever starts at random."""

    tuning_seeds: int = 1
    """How many of the seeds, from the first, choose the learning rate."""

    learning_rates: dict[str, list[float]] = field(default_factory=dict)
    """Method -> grid. Where missing, a third, one and three times the rate that is the command's
    default for the method."""

    extend_grids: int = 0
    """Where the best rate is at the edge of its grid, try the next one beyond, at the distance of
    the last two, up to so many times."""

    validation_fraction: float = 0.1
    """Share of the training data that is held out to choose by; the task's evaluation data is the
    test."""

    forgetting_tokens: int = 2048
    """How much general text to measure the loss on before and after, of models for text; 0: none.
    An encoder's loss is that of finding the second half of a paragraph by its first."""

    unrelated: str = ""
    """Data of another task, as `data.eval_path` of `train` takes them, whose loss is measured
    before and after as well."""

    rewind: list[float] = field(default_factory=list)
    """Shares of the trained update, above 0 and below 1, with which every run of an arm that has a
    scale, alpha / rank, is tested too."""

    def __post_init__(self) -> None:
        if not self.task and not self.options:
            raise ValueError("`task` is ''; name a configuration's path.")
        if not self.arms:
            raise ValueError("`arms` is empty; name at least one arm, such as paca: {rank: 8}.")
        self.arms = {
            name: arm if isinstance(arm, Arm) else Arm(**arm) for name, arm in self.arms.items()
        }
        if self.reference is None:
            self.reference = next(iter(self.arms))
        if self.reference not in self.arms:
            raise ValueError(
                f"`reference` ({self.reference!r}) must be one of the arms {sorted(self.arms)}."
            )
        for name in ("extend_grids", "forgetting_tokens"):
            if (number := getattr(self, name)) < 0:
                raise ValueError(f"`{name}` ({number}) must be at least 0; with 0 it is off.")
        if self.unrelated and self.command != "train":
            raise ValueError(
                f"`unrelated` ({self.unrelated!r}) is for `command` train, and it is "
                f"{self.command}: a classifier's head knows one task; drop it."
            )
        if not all(0 < share < 1 for share in self.rewind):
            raise ValueError(f"`rewind` ({self.rewind}) must be shares above 0 and below 1.")
        self._check_seeds()
        self.learning_rates = {
            choose(name, METHODS, option="learning_rates"): rates
            for name, rates in self.learning_rates.items()
        }
        for method, rates in self.learning_rates.items():
            check_rates(f"learning_rates.{method}", rates)
        if not 0 < self.validation_fraction < 1:
            raise ValueError(
                f"`validation_fraction` ({self.validation_fraction}) must be above 0 and below 1: "
                "the rate may not be chosen on test data."
            )

    def _check_seeds(self) -> None:
        several = 1 <= len(self.seeds) <= _MOST_SEEDS
        if not several or len(set(self.seeds)) < len(self.seeds) or min(self.seeds) < 0:
            raise ValueError(
                f"`seeds` ({self.seeds}) must be 1 to {_MOST_SEEDS} different numbers of at least "
                "0: the exact test goes through all signs of their differences."
            )
        if not 1 <= self.tuning_seeds <= len(self.seeds):
            raise ValueError(
                f"`tuning_seeds` ({self.tuning_seeds}) must be in [1, {len(self.seeds)}], the "
                "number of seeds."
            )


def check_rates(name: str, rates: list[float]) -> None:
    """Refuse a grid with which nothing could be chosen."""
    if not rates or len(set(rates)) < len(rates) or not all(0 < r < float("inf") for r in rates):
        raise ValueError(f"`{name}` ({rates}) must be different numbers above 0, at least one.")


def read_study(path: Path) -> StudyConfig:
    """Read a study from YAML; paths in it are taken as they are, from where the command runs."""
    values = read_values(path)
    parser = option_parser()
    parser.add_class_arguments(StudyConfig)
    check_keys(values, {field.name for field in fields(StudyConfig)}, str(path))
    arms = values.get("arms")
    if arms is not None and not isinstance(arms, dict):
        raise ValueError(f"{path}: `arms` is a {type(arms).__name__}; it must map names to arms.")
    for name, arm in (arms or {}).items():
        check_keys(arm or {}, {field.name for field in fields(Arm)}, f"{path}, arm {name!r}")
    values["arms"] = {str(name): arm or {} for name, arm in (arms or {}).items()}
    try:
        parsed = parser.parse_object(values).as_dict()
    except Exception as error:  # jsonargparse's own classes of errors
        raise ValueError(f"{path}: {' '.join(str(error).split())}") from error
    return StudyConfig(**parsed)
