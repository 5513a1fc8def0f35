"""Reinforcement learning: GRPO and RLOO, with every option of TRL's that a run here has."""

import re
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from trl import GRPOConfig, RLOOConfig

from pacatune.data import REASONING_GYM, PromptDataConfig
from pacatune.training.metrics import RlReport
from pacatune.training.preference_config import ReferenceDefaults, ReferenceRunConfig

_CODE = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")


@dataclass
class SamplingDefaults(ReferenceDefaults):
    """Options of tasks in which the model answers prompts while it trains."""

    elsewhere: ClassVar[dict[str, str]] = {
        **ReferenceDefaults.elsewhere,
        "use_transformers_continuous_batching": "TRL casts the trained weights for it",
        "use_transformers_paged": "TRL casts the trained weights for it",
        "log_completions_hub_repo": "set `training.log_completions` and upload them yourself",
    }

    def __post_init__(self) -> None:
        # The loss says nothing about how good the answers are.
        chooses = self.load_best_model_at_end or self.save_strategy == "best"  # type: ignore[attr-defined]
        if chooses and self.metric_for_best_model is None:  # type: ignore[has-type]
            self.metric_for_best_model = "eval_reward"
        super().__post_init__()


@dataclass
class GrpoTrainingConfig(SamplingDefaults, GRPOConfig):
    """Every option of TRL's GRPOConfig, with these defaults."""


@dataclass
class RlooTrainingConfig(SamplingDefaults, RLOOConfig):
    """Every option of TRL's RLOOConfig, with these defaults."""


@dataclass(kw_only=True)
class SamplingRunConfig(ReferenceRunConfig[RlReport]):
    """A run in which the model answers prompts, and rewards say which answers are good.

    Raises:
        ValueError: If there is no reward, or one that is no name of a function or verifier.
    """

    best_metric: ClassVar[str] = "eval_reward"
    without_reference: ClassVar[str] = "set `training.beta` to 0"

    data: PromptDataConfig
    """Prompts."""

    reward: list[str] = field(default_factory=list)
    """Rewards: Python functions as module:name, which only the command line may give
    (`--reward my_rewards:is_short`, several times for several), or `reasoning-gym:TASK`, the
    verifier of the data that reasoning-gym makes, which is the reward where none is given."""

    early_stopping_patience: int | None = None
    """Stop after this many evaluations without a higher eval_reward, and keep the best result."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_rewards()
        weights = self.training.reward_weights
        if weights is not None and len(weights) != len(self.reward):
            raise ValueError(
                f"`training.reward_weights` ({weights}) has {len(weights)} weights for "
                f"{len(self.reward)} rewards ({', '.join(self.reward)}); give one for each."
            )

    def _check_rewards(self) -> None:
        data = self.data
        if not self.reward and data.is_generated:
            self.reward = [data.path]
        if not self.reward:
            raise ValueError(
                "there is no reward; give one on the command line, as in `--reward "
                "my_rewards:is_short` (a Python function by module and name)."
            )
        for name in self.reward:
            if name.startswith(REASONING_GYM):
                if name != data.path:
                    raise ValueError(
                        f"`reward` ({name!r}) scores what reasoning-gym generates for it, and "
                        f"`data.path` is {data.path!r}; set that to {name!r} too."
                    )
            elif not _CODE.fullmatch(name):
                raise ValueError(
                    f"`reward` ({name!r}) must be a Python function as module:name, such as "
                    f"my_rewards:is_short, or {REASONING_GYM}TASK."
                )
        if len(set(self.reward)) < len(self.reward):
            raise ValueError(
                f"`reward` ({', '.join(self.reward)}) names one twice; set "
                "`training.reward_weights` instead."
            )

    def has_reference(self) -> bool:
        """Whether the reference is asked while the model trains."""
        return self.training.beta != 0

    def code(self) -> list[str]:
        """Return the rewards that are Python functions, which only the command line may give."""
        return [name for name in self.reward if not name.startswith(REASONING_GYM)]

    def repeat_command(self, config_file: object) -> str:
        """Return the command that does this run; functions are named in it, not in the file."""
        words = "".join(f" --reward {name}" for name in self.reward) if self.code() else ""
        return super().repeat_command(config_file) + words


@dataclass(kw_only=True)
class GrpoRunConfig(SamplingRunConfig):
    """One run of Group Relative Policy Optimization."""

    task_class: ClassVar[str] = "pacatune.training.rl:GrpoTask"

    task: Literal["grpo"] = "grpo"
    """What to do: Group Relative Policy Optimization."""

    training: GrpoTrainingConfig = field(default_factory=GrpoTrainingConfig)
    """Every option of TRL's GRPOConfig."""


@dataclass(kw_only=True)
class RlooRunConfig(SamplingRunConfig):
    """One run of REINFORCE Leave-One-Out."""

    task_class: ClassVar[str] = "pacatune.training.rl:RlooTask"

    task: Literal["rloo"] = "rloo"
    """What to do: REINFORCE Leave-One-Out."""

    training: RlooTrainingConfig = field(default_factory=RlooTrainingConfig)
    """Every option of TRL's RLOOConfig."""
