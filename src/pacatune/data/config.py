"""What to train on: the `data` section of a run."""

from dataclasses import dataclass
from typing import Literal

Format = Literal["messages", "prompt-completion", "instruction", "text", "mmlu"]


@dataclass(kw_only=True)
class DataConfig:
    """Training and evaluation data.

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

    format: Literal["auto", "messages", "prompt-completion", "instruction", "text", "mmlu"] = "auto"
    """`messages` (chats), `prompt-completion` (columns prompt and completion, texts or chats),
    `instruction` (columns instruction, input if any, and output), `text`, `mmlu` (columns question,
    choices and answer, or MMLU's .csv files; in the words of `pacatune evaluate mmlu`), or `auto`:
    found from the columns of the first row."""

    eval_path: str | None = None
    """Evaluation data, as `path`. Without it, `eval_fraction` of the training data is held out."""

    eval_split: str | None = None
    """Split of a hub data set to evaluate on, instead of holding out a fraction."""

    eval_fraction: float = 0.05
    """Fraction of the training data held out for evaluation; 0 evaluates on nothing."""

    seed: int = 0
    """Seed of the choice of the held-out rows."""

    chat_template: str | None = None
    """Chat template: a file or the Jinja text itself. The model's own where null."""

    special_tokens: bool = True
    """Whether the tokenizer puts its own tokens (BOS) before plain texts and an EOS ends them;
    false: neither, as in the experiments of PaCA's authors. Chats have those of their template."""

    loss: Literal["completion", "all"] = "completion"
    """Tokens that are learned: `completion` (the completion, or every assistant turn of a chat)
    or `all`."""

    def __post_init__(self) -> None:
        if not self.path:
            raise ValueError(
                f"`data.path` is {self.path!r}; give a .jsonl, .json, .csv or .parquet file, "
                "a folder of them, or a hub data set id."
            )
        if not 0 <= self.eval_fraction < 1:
            raise ValueError(
                f"`data.eval_fraction` ({self.eval_fraction}) must be in [0, 1); "
                "use 0 to hold nothing out."
            )
