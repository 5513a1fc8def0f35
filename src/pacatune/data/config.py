"""What to train on: the `data` section of a run."""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from pacatune.data.formats import VARIABLES, check_variables
from pacatune.names import check_choices, choose

TextFormat = Literal["auto", "messages", "sharegpt", "prompt-completion", "instruction", "text"]


@dataclass(kw_only=True)
class SourceConfig:
    """One of several data sets that are mixed; other options are those of `data`."""

    path: str = ""
    name: str | None = None
    split: str = "train"
    format: TextFormat = "auto"
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
        for key in values:
            choose(str(key), [option.name for option in fields(cls)], option="data.datasets")
        return cls(**values)

    def __post_init__(self) -> None:
        check_choices(self, "data.datasets.")
        weight = 1 if self.weight is None else self.weight
        if not isinstance(weight, int | float) or not 0 < weight < float("inf"):
            raise ValueError(
                f"`weight` ({self.weight!r}) of {self.path} in `data.datasets` must be a number "
                "above 0; mend it, or leave the data set out."
            )


@dataclass(kw_only=True)
class DataSection:
    """Where the data of a task is, and what is held out of it.

    Raises:
        ValueError: If options have values that they cannot have.
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
    """Seed for choosing what is held out, and for all else that is drawn from the data."""

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            """Options of a task's own section."""

    def __post_init__(self) -> None:
        check_choices(self, "data.")
        if not 0 <= self.eval_fraction < 1:
            raise ValueError(
                f"`data.eval_fraction` ({self.eval_fraction}) must be in [0, 1); use 0 to hold "
                "nothing out."
            )
        for option in fields(self):
            value = getattr(self, option.name)
            if int in get_args(option.type) and value is not None and value < 1:
                raise ValueError(f"`data.{option.name}` ({value}) must be at least 1, or null.")
        if not (self.path or getattr(self, "datasets", None)):
            raise ValueError(
                f"`data.path` is {self.path!r}; give a file, a folder or a hub data set id."
            )

    def about(self) -> str:
        """Return where the training data is, for the model card."""
        return ", ".join(f"`{source.path}`" for source, _ in self.sources())

    def sources(self) -> list[tuple[SourceConfig, str]]:
        """Return the data sets of training, each with the option that names it."""
        several = [(source, "data.datasets") for source in getattr(self, "datasets", None) or ()]
        return several or [(self._source(self.path, self.split), "data.path")]

    def _source(self, path: str, split: str) -> SourceConfig:
        text_format: TextFormat = getattr(self, "format", "auto")
        return SourceConfig(path=path, name=self.name, split=split, format=text_format)

    def evaluation_source(self) -> tuple[SourceConfig, str] | None:
        """Return the data set of evaluation and the option that names it."""
        if not (self.eval_path or self.eval_split):
            return None
        path, option = self.eval_path or self.path, "eval_path" if self.eval_path else "path"
        source = self._source(path, self.eval_split or self.split)
        if self.eval_path and Path(path).expanduser().exists():  # name and split are the hub's
            source = SourceConfig(path=path, split=self.eval_split or "train", format=source.format)
        return source, f"data.{option}"


@dataclass(kw_only=True)
class TextDataConfig(DataSection):
    """Texts or chats, whatever is learned of them."""

    chat_template: str | None = None
    """Chat template: a file or the Jinja text itself. The model's own where null."""

    chat_template_kwargs: dict[str, Any] | None = None
    """Variables of the chat template, such as {enable_thinking: false}, unless a row sets others in
    a column of this name. They are saved in the template, so that they hold for generation too."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_variables(f"`data.{VARIABLES}`", self.chat_template_kwargs)


@dataclass(kw_only=True)
class DataConfig(TextDataConfig):
    """Training and evaluation data of supervised fine-tuning.

    Raises:
        ValueError: If options contradict each other.
    """

    datasets: list[Any] | None = None
    """Several data sets instead of `path`: each with `path` and, if need be, `name`, `split`,
    `format` and `weight`. Without weights they are put together whole; with weights, examples are
    drawn from them at random, in these proportions."""

    mix_strategy: Literal["first_exhausted", "all_exhausted"] = "first_exhausted"
    """With weights, when to stop drawing: once one of `datasets` has run out, or once all have been
    seen, which repeats examples of the others."""

    format: TextFormat = "auto"
    """`messages` (chats), `sharegpt` (column conversations), `prompt-completion` (columns prompt
    and completion, texts or chats), `instruction` (columns instruction, input if any, and output),
    `text`, or `auto`: found from the columns of the first row."""

    special_tokens: bool = True
    """Whether the tokenizer puts its own tokens (BOS) before plain texts and an EOS ends them;
    false: neither, as in the experiments of PaCA's authors. Chats have those of their template."""

    loss: Literal["completion", "all"] = "completion"
    """Tokens that are learned: `completion` (the completion, or every assistant turn of a chat)
    or `all`."""

    def __post_init__(self) -> None:
        self.datasets = self.datasets and [*map(SourceConfig.of, self.datasets)]
        super().__post_init__()
        weights = [source.weight for source in self.datasets or () if source.weight is not None]
        alone = ["path", "name", "split", "eval_split", *([] if self.eval_path else ["format"])]
        for name in alone if self.datasets else ():
            if getattr(self, name) != getattr(DataConfig, name):
                raise ValueError(
                    f"`data.{name}` is for a single data set, and there are `data.datasets`; set "
                    "it for one of those."
                )
        if weights and len(weights) < len(self.datasets or ()):
            raise ValueError(
                "some of `data.datasets` have a `weight` and others none; give all one, or none."
            )
        if not weights and self.mix_strategy != "first_exhausted":
            raise ValueError("`data.mix_strategy` is for `data.datasets` with weights; drop it.")


@dataclass(kw_only=True)
class PreferenceDataConfig(TextDataConfig):
    """Answers that are preferred or not, in TRL's formats.

    dpo and reward: columns `chosen` and `rejected`, and `prompt` unless both begin with it. kto:
    columns `prompt`, `completion` and `label`, or those of dpo. Texts or chats.
    """


@dataclass(kw_only=True)
class PromptDataConfig(TextDataConfig):
    """Prompts (column `prompt`, texts or chats) that the model answers while it trains.

    Reward functions get the other columns.
    """


@dataclass(kw_only=True)
class TextClassConfig(DataSection):
    """Texts, each of one class: columns `text` and `label`."""

    eval_fraction: float = 0.1
    """Fraction of the training data held out for evaluation; 0 evaluates on nothing."""

    max_length: int | None = None
    """Tokens at which texts are cut; the limit of tokenizer or model where null."""
