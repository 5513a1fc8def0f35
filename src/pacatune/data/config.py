"""What to train on: the `data` section of a run."""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_args

from pacatune.names import choose

TORCHVISION_PREFIX = "torchvision:"
REASONING_GYM = "reasoning-gym:"
"""Before the name of a task of the package reasoning-gym: its data, or its verifier."""
SHUFFLE_BUFFER = 1000
"""Examples of a stream from which the next is drawn, unless a run says otherwise."""


@dataclass(kw_only=True)
class TextDataConfig:
    """Training and evaluation texts, whatever is learned of them.

    Raises:
        ValueError: If `path` is missing or `eval_fraction` is not in [0, 1).
    """

    path: str = ""
    """Training data: a .jsonl, .json, .csv or .parquet file, a folder of them, or a hub data set
    id. Required."""

    name: str | None = None
    """Configuration of a hub data set, where it has several."""

    split: str = "train"
    """Split of a hub data set to train on."""

    eval_path: str | None = None
    """Evaluation data, as `path`. Without it, `eval_fraction` of the training data is held out."""

    eval_split: str | None = None
    """Split of a hub data set to evaluate on, instead of holding out a fraction."""

    eval_fraction: float = 0.05
    """Fraction of the training data held out for evaluation; 0 evaluates on nothing."""

    seed: int = 0
    """Seed for choosing the held-out rows."""

    chat_template: str | None = None
    """Chat template: a file or the Jinja text itself. The model's own where null."""

    def __post_init__(self) -> None:
        if not self.path:
            raise ValueError(
                f"`data.path` is {self.path!r}; give a .jsonl, .json, .csv or .parquet file, "
                "a folder of them, or a hub data set id."
            )
        check_fraction(self.eval_fraction)

    def about(self) -> str:
        """Return where the training data is, for the model card."""
        return ", ".join(f"`{source.path}`" for source, _ in self.sources())

    def sources(self) -> "list[tuple[SourceConfig, str]]":
        """Return the data sets of training, each with the option that names it."""
        return [(self._source(self.path, self.split), "data.path")]

    def _source(self, path: str, split: str) -> "SourceConfig":
        found: TextFormat = getattr(self, "format", "auto")
        return SourceConfig(path=path, name=self.name, split=split, format=found)

    def evaluation_source(self) -> "tuple[SourceConfig, str] | None":
        """Return the data set of evaluation and the option that names it."""
        if not (self.eval_path or self.eval_split):
            return None
        path = self.eval_path or self.path
        if self.eval_split:
            refuse_split(path, "data.eval_split", self.eval_split)
        option = "data.eval_path" if self.eval_path else "data.path"
        return self._source(path, self.eval_split or self.split), option


TextFormat = Literal[
    "auto", "messages", "sharegpt", "prompt-completion", "instruction", "text", "mmlu"
]


@dataclass(kw_only=True)
class SourceConfig:
    """One of several data sets that are mixed."""

    path: str = ""
    """As `data.path`."""

    name: str | None = None
    """As `data.name`."""

    split: str = "train"
    """As `data.split`."""

    format: TextFormat = "auto"
    """As `data.format`."""

    weight: float | None = None
    """Share of the examples that come from here, relative to the weights of the others."""

    @classmethod
    def of(cls, values: Any) -> "SourceConfig":
        """Make one of what YAML says."""
        if isinstance(values, cls):
            return values
        if not isinstance(values, dict) or not isinstance(values.get("path"), str):
            raise ValueError(
                f"`data.datasets` has {values!r:.80}; each must be a mapping, as {{path: a.jsonl}}."
            )
        known = [option.name for option in fields(cls)]
        for key in values:
            choose(str(key), known, option=f"option of {values['path']} in data.datasets")
        return cls(**values)

    def __post_init__(self) -> None:
        choose(str(self.format), get_args(TextFormat), option=f"format of {self.path}")
        weight = 1 if self.weight is None else self.weight
        if not isinstance(weight, int | float) or not 0 < weight < float("inf"):
            raise ValueError(
                f"`weight` ({self.weight!r}) of {self.path} in `data.datasets` must be a number "
                "above 0; mend it, or leave the data set out."
            )


@dataclass(kw_only=True)
class DataConfig(TextDataConfig):
    """Training and evaluation data of supervised fine-tuning.

    Raises:
        ValueError: If `path` is missing or `eval_fraction` is not in [0, 1).
    """

    path: str = ""
    """Training data: a .jsonl, .json, .csv or .parquet file, a folder of them, or a hub data set
    id. Required, unless there are `datasets`."""

    datasets: list[Any] | None = None
    """Several data sets instead of `path`: each with `path` and, if need be, `name`, `split`,
    `format` and `weight`. Without weights they are put together whole; with weights, examples are
    drawn from them at random, in these proportions."""

    mix_strategy: Literal["first_exhausted", "all_exhausted"] = "first_exhausted"
    """With weights, when to stop drawing: once one of `datasets` has run out, or once all have been
    seen, which repeats examples of the others."""

    seed: int = 0
    """Seed for choosing the held-out rows, drawing from `datasets` and shuffling a stream."""

    format: TextFormat = "auto"
    """`messages` (chats), `sharegpt` (column conversations), `prompt-completion` (columns prompt
    and completion, texts or chats), `instruction` (columns instruction, input if any, and output),
    `text`, `mmlu` (columns question, choices and answer, or MMLU's .csv files; in the words of
    `pacatune evaluate mmlu`), or `auto`: found from the columns of the first row."""

    streaming: bool = False
    """Read and encode training examples while they are trained on, again from the first after the
    last; needs `training.max_steps`. The first 1000 are checked before."""

    shuffle_buffer: int = SHUFFLE_BUFFER
    """With `streaming`, number of examples from which the next is drawn at random; 0 keeps the
    order of the data."""

    special_tokens: bool = True
    """Whether the tokenizer puts its own tokens (BOS) before plain texts and an EOS ends them;
    false: neither, as in the experiments of PaCA's authors. Chats have those of their template."""

    loss: Literal["completion", "all"] = "completion"
    """Tokens that are learned: `completion` (the completion, or every assistant turn of a chat)
    or `all`."""

    def __post_init__(self) -> None:
        if self.datasets is None:
            super().__post_init__()
        else:
            check_fraction(self.eval_fraction)
            self.datasets = [SourceConfig.of(one) for one in self.datasets]
        several = self.datasets or []
        weights = [one.weight for one in several if one.weight is not None]
        single = {"path": "", "name": None, "split": "train", "eval_split": None}
        single |= {} if self.eval_path else {"format": "auto"}
        changed = [name for name, default in single.items() if getattr(self, name) != default]
        is_held_out = self.eval_fraction and not (self.eval_path or self.eval_split)
        repeats = self.mix_strategy != "first_exhausted"
        problems = {
            "`data.datasets` is empty; list data sets, or give `data.path`": self.datasets == [],
            f"`data.{changed and changed[0]}` is for a single data set, and there are "
            "`data.datasets`; set it for one of those": bool(several and changed),
            "some of `data.datasets` have a `weight` and others none; give all one, or none": (
                bool(weights) and len(weights) < len(several)
            ),
            "`data.mix_strategy` is for `data.datasets` with weights, and streams begin again and "
            "never run out; drop it": repeats and (self.streaming or not weights),
            f"`data.shuffle_buffer` ({self.shuffle_buffer}) must be at least 0, and is for "
            "`data.streaming`; other data is shuffled as a whole": (
                self.shuffle_buffer < 0
                or (self.shuffle_buffer != SHUFFLE_BUFFER and not self.streaming)
            ),
            f"`data.eval_fraction` ({self.eval_fraction}) with `data.streaming`: a part of data "
            "that is not read as a whole cannot be held out; give `data.eval_path`, or 0": (
                self.streaming and bool(is_held_out)
            ),
            "`data.datasets` with `data.streaming` would come one after the other; give each a "
            "`weight`": self.streaming and len(several) > 1 and not weights,
        }
        for problem, is_found in problems.items():
            if is_found:
                raise ValueError(f"{problem}.")

    def sources(self) -> list[tuple[SourceConfig, str]]:
        """Return the data sets of training, each with the option that names it."""
        if self.datasets is None:
            return super().sources()
        return [(source, "data.datasets") for source in self.datasets]


@dataclass(kw_only=True)
class PreferenceDataConfig(TextDataConfig):
    """Answers that are preferred or not, in TRL's formats.

    dpo and reward: columns `chosen` and `rejected`, and `prompt` unless both begin with it. kto:
    columns `prompt`, `completion` and `label`, or those of dpo. Texts or chats.
    """


@dataclass(kw_only=True)
class PromptDataConfig(TextDataConfig):
    """Prompts that the model answers while it trains; reward functions get the other columns.

    Raises:
        ValueError: If the options of reasoning-gym contradict `path`.
    """

    path: str = ""
    """Training data with a column `prompt` (texts or chats): a .jsonl, .json, .csv or .parquet
    file, a folder of them, a hub data set id; or reasoning-gym:TASK, such as
    reasoning-gym:chain_sum, which is generated. Required."""

    seed: int = 0
    """Seed for choosing the held-out rows, and for what reasoning-gym generates."""

    size: int | None = None
    """Number of examples that reasoning-gym generates; 1000 where null."""

    options: dict[str, Any] | None = None
    """Options of the task of reasoning-gym, such as {max_terms: 3}."""

    system_prompt: str | None = None
    """System turn that is put before every prompt without one; it makes chats of texts."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_counts(self, "size")
        made, read = (self.size, self.options), (self.eval_path, self.eval_split)
        if any(value is not None for value in (read if self.is_generated else made)):
            raise ValueError(
                "`data.size` and `data.options` are for what reasoning-gym generates, "
                f"`data.eval_path` and `data.eval_split` for other data, and `data.path` is "
                f"{self.path!r}; drop them."
            )

    @property
    def is_generated(self) -> bool:
        """Whether reasoning-gym makes the data."""
        return self.path.startswith(REASONING_GYM)


@dataclass(kw_only=True)
class TextClassConfig:
    """Texts, each of one class."""

    path: str = ""
    """Training data with columns `text` and `label`: a file, a folder, or a hub data set id."""

    split: str = "train"
    """Split of a hub data set to train on."""

    eval_path: str | None = None
    """Evaluation data, as `path`. Without it, `eval_fraction` of the training data is held out."""

    eval_split: str | None = None
    """Split of a hub data set to evaluate on, instead of holding out a fraction."""

    eval_fraction: float = 0.1
    """Fraction of the training data held out for evaluation."""

    seed: int = 0
    """Seed for choosing the held-out rows."""

    num_train: int | None = None
    """Train on this many rows; all where null."""

    max_length: int = 128
    """Tokens at which texts are cut."""

    def __post_init__(self) -> None:
        if not self.path:
            raise ValueError(
                f"`data.path` is {self.path!r}; give a file with columns text and label."
            )
        check_fraction(self.eval_fraction)
        check_counts(self, "num_train", "max_length")

    def about(self) -> str:
        """Return where the training data is, for the model card."""
        return f"`{self.path}`"


@dataclass(kw_only=True)
class ImageDataConfig:
    """Training and evaluation images, each of one class."""

    path: str = ""
    """Training images: a folder with a folder of images per class (or with the folders `train` and
    `val` or `test` of such), a hub data set id, or torchvision:CIFAR10, torchvision:CIFAR100,
    torchvision:OxfordIIITPet or torchvision:Flowers102. Required."""

    name: str | None = None
    """Configuration of a hub data set, where it has several."""

    split: str | None = None
    """Split of a hub or torchvision data set to train on; `train` (OxfordIIITPet: `trainval`) where
    null."""

    image_column: str | None = None
    """Column of a hub data set with the images; the only one of that kind where null."""

    label_column: str | None = None
    """Column of a hub data set with the classes; the only one of that kind where null."""

    root: str | None = None
    """Folder of torchvision's data sets, downloaded into it where missing; in torch's cache where
    null."""

    eval_path: str | None = None
    """Evaluation images, as `path`. Without them, `eval_fraction` of the training images is held
    out."""

    eval_split: str | None = None
    """Split of a hub or torchvision data set to evaluate on, instead of holding out a fraction."""

    eval_fraction: float = 0.1
    """Fraction of each class held out for evaluation; 0 evaluates on nothing."""

    seed: int = 0
    """Seed for choosing held-out images and for the limits per class."""

    train_per_class: int | None = None
    """Train on this many images of each class; all where null."""

    eval_per_class: int | None = None
    """Evaluate on this many images of each class; all where null."""

    image_size: int | None = None
    """Height and width that the model sees; those it was made for where null."""

    augmentation: Literal["none", "flip", "crop"] = "none"
    """Changes to training images: `flip` (half are mirrored), or `crop` (a random part of at least
    a quarter, mirrored half the time). Evaluation always uses the model's own transform."""

    check_images: bool = True
    """Decode every image before training, so that a broken one is found before work is lost."""

    def __post_init__(self) -> None:
        if not self.path:
            raise ValueError(
                f"`data.path` is {self.path!r}; give a folder with a folder of images per class, a "
                f"hub data set id, or one of torchvision's, such as {TORCHVISION_PREFIX}CIFAR10."
            )
        check_fraction(self.eval_fraction)
        check_counts(self, "train_per_class", "eval_per_class", "image_size")
        choose(self.augmentation, ("none", "flip", "crop"), option="data.augmentation")

    def about(self) -> str:
        """Return where the training data is, for the model card."""
        return f"`{self.path}`"


def refuse_split(path: str, option: str, split: str) -> None:
    """Refuse a split of data that is local: it would be ignored, and all of the data taken."""
    if Path(path).expanduser().exists():
        raise ValueError(
            f"`{option}` ({split!r}) is for data sets of the hub, and {path} is local; drop it, "
            "or give `data.eval_path`."
        )


def check_fraction(fraction: float) -> None:
    """Refuse a share of held-out data that leaves nothing to train on."""
    if not 0 <= fraction < 1:
        raise ValueError(
            f"`data.eval_fraction` ({fraction}) must be in [0, 1); use 0 to hold nothing out."
        )


def check_counts(section: object, *names: str) -> None:
    """Refuse numbers below 1 among options of a `data` section that may be null."""
    for name in names:
        value = getattr(section, name)
        if value is not None and value < 1:
            raise ValueError(f"`data.{name}` ({value}) must be at least 1, or null.")
