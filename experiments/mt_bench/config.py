"""What can be chosen about one evaluation."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from jsonargparse.typing import NonNegativeInt, PositiveFloat, PositiveInt

from pacatune.cli.options import ModelOptions
from pacatune.precision import Dtype


@dataclass(frozen=True, kw_only=True)
class MtBenchConfig(ModelOptions):
    """Let a model answer MT-Bench's 80 questions of two turns; a judge grades the answers.

    A run that was stopped goes on when the same command is given again.
    """

    output: Path
    """Folder of answers, judgments and results; a run that finds some of them goes on there."""
    quantization: Literal["nf4", "fp4", "int8"] | None = None
    """Hold the base in 4 or 8 bits."""
    dtype: Dtype = "auto"
    """Number type of the base; auto is its own."""
    chat_template: Path | None = None
    """File with the Jinja text that writes conversations, instead of the tokenizer's own."""
    max_new_tokens: PositiveInt = 1024
    """Most new tokens in each turn."""
    batch_size: PositiveInt = 8
    """Questions answered at once."""
    seed: NonNegativeInt = 0
    """Seed for sampled answers and for the intervals."""
    questions: str
    """File of questions, or a hub data set such as lighteval/mt-bench."""
    references: str | None = None
    """File of reference answers (default: the questions' own)."""
    judge_prompts: Path | None = None
    """File with the judge's prompts; without it, the model only answers."""
    judge_url: str = "https://api.openai.com/v1"
    """Address of an OpenAI-compatible endpoint."""
    judge_model: str = "gpt-4o-mini"
    """Name of the judge there."""
    judge_key_env: str | None = None
    """Environment variable with the key, such as OPENAI_API_KEY; without it, `no-key` is sent."""
    judge_parallel: PositiveInt = 4
    """Parallel requests."""
    judge_timeout_s: PositiveFloat = 120.0
    """Seconds without a reply after which a request has failed."""
    judge_retries: NonNegativeInt = 10
    """Retries of a request whose failure may pass."""
    judge_max_tokens: PositiveInt = 2048
    """Most tokens of a reply, thoughts included."""
    judge_attempts: PositiveInt = 3
    """Times to ask for a rating from 1 to 10."""

    @property
    def model_id(self) -> str:
        """Name of what answers: the folders' names."""
        names = [Path(one).expanduser().resolve().name for one in (self.model, self.adapter) if one]
        if not names:
            raise ValueError("nothing to evaluate; give --model, --adapter or both.")
        return "+".join(names)

    def judge_key(self) -> str | None:
        """Read the key from the environment."""
        if self.judge_key_env is None:
            return None
        key = os.environ.get(self.judge_key_env, "").strip()
        if not key:
            # The name is not shown: whoever confuses it with the key would see that.
            raise ValueError(
                "--judge-key-env names a variable that is not set; export it, or drop the option "
                "for a judge without key."
            )
        return key
