"""Runs on preferences: DPO, KTO and reward models, with every option of TRL's."""

from abc import abstractmethod
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from trl import DPOConfig, KTOConfig, RewardConfig

from pacatune.data import PreferenceDataConfig
from pacatune.methods import METHODS
from pacatune.training.config import LanguageRunConfig, R, TrlDefaults
from pacatune.training.metrics import (
    JudgedReport,
    PreferenceReport,
    RewardModelReport,
)

_PADDING = "examples are padded with the tokenizer's own token"


@dataclass
class ReferenceDefaults(TrlDefaults):
    """Options of tasks that compare the model with a reference: itself without the adapter."""

    elsewhere: ClassVar[dict[str, str]] = {
        **TrlDefaults.elsewhere,
        "sync_ref_model": "the reference is the pretrained model, with the adapter off",
    }

    learning_rate: float | None = None
    """Peak learning rate; where null, that of the method: 5e-5 paca and qpaca, 1e-6 full,
    2e-5 the others."""


@dataclass
class DpoTrainingConfig(ReferenceDefaults, DPOConfig):
    """Every option of TRL's DPOConfig, with these defaults."""

    elsewhere: ClassVar[dict[str, str]] = {
        **ReferenceDefaults.elsewhere,
        "pad_token": _PADDING,
        "padding_free": "TRL has no such DPO at present",
        "truncation_mode": "examples are cut at their end; shorten them yourself",
    }


@dataclass
class KtoTrainingConfig(ReferenceDefaults, KTOConfig):
    """Every option of TRL's KTOConfig, with these defaults."""

    def check_options(self) -> None:
        """Refuse also what leaves nothing to estimate the KL divergence by."""
        super().check_options()
        if self.loss_type == "apo_zero_unpaired":
            return
        if self.train_sampling_strategy != "sequential":
            raise ValueError(
                f"`training.train_sampling_strategy` ({self.train_sampling_strategy!r}) must be "
                "'sequential' with this loss: it compares each answer with its neighbour's prompt. "
                "The examples are shuffled once, with `data.seed`."
            )
        if self.per_device_train_batch_size < 2:
            raise ValueError(
                "`training.per_device_train_batch_size` (1) must be at least 2 with this loss: it "
                "compares each answer with the prompt of another one in its batch."
            )


@dataclass
class RewardTrainingConfig(TrlDefaults, RewardConfig):
    """Every option of TRL's RewardConfig, with these defaults."""

    elsewhere: ClassVar[dict[str, str]] = {
        **TrlDefaults.elsewhere,
        "pad_token": _PADDING,
        "chat_template_path": "set `data.chat_template`",
    }


@dataclass(kw_only=True)
class ReferenceRunConfig(LanguageRunConfig[R]):
    """A run that compares the model with a reference: itself, with the adapter off."""

    rate_share: ClassVar[float] = 0.1
    without_reference: ClassVar[str]
    """What to set so that no reference is asked while the model trains."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_dropout(self)
        if self.adapter is not None and self.asks_reference():
            raise ValueError(
                f"`adapter` ({self.adapter!r}) with `task` ({self.task!r}): the reference is the "  # type: ignore[attr-defined]
                "model with the adapter off, and should be the one that training starts from; "
                "merge the adapter (`pacatune merge`), which is exact, and give the result as "
                "`model.path`."
            )
        if not self.has_reference():
            return
        if not METHODS[self.method].has_adapter:
            raise ValueError(
                f"`method` ({self.method!r}) with `task` ({self.task!r}): the reference is the "  # type: ignore[attr-defined]
                "model with the adapter off, and this method has none, so a second model would lie "
                f"in memory; choose another method, or {self.without_reference}."
            )
        if METHODS[self.method].is_paca and self.paca.bias != "none":
            raise ValueError(
                f"`paca.bias` ({self.paca.bias!r}) trains biases of the base, which stay trained "
                "where the adapter is off, so the reference would not be the pretrained model; set "
                "it to none."
            )

    @abstractmethod
    def has_reference(self) -> bool:
        """Whether the reference is asked while the model trains."""

    def asks_reference(self) -> bool:
        """Whether the reference is asked at all."""
        return self.has_reference()


def check_dropout(config: LanguageRunConfig[Any]) -> None:
    """Refuse dropout that TRL would switch off."""
    if config.lora.lora_dropout and config.training.disable_dropout:
        raise ValueError(
            f"`lora.lora_dropout` ({config.lora.lora_dropout:g}, of `method` {config.method!r}) is "
            "switched off by `training.disable_dropout` (True); set that to false, or take the "
            "dropout out."
        )


@dataclass(kw_only=True)
class PreferenceRunConfig(ReferenceRunConfig[R]):
    """A run on answers that are preferred or not; the reference may have judged them before."""

    without_reference: ClassVar[str] = "set `training.precompute_ref_log_probs` to true"

    data: PreferenceDataConfig
    """Pairs of answers; for KTO, answers with labels too."""

    def has_reference(self) -> bool:
        """Whether the reference is asked while the model trains."""
        return not self.training.precompute_ref_log_probs

    def asks_reference(self) -> bool:
        """Whether the reference is asked at all: while the model trains, or before."""
        return True


@dataclass(kw_only=True)
class DpoRunConfig(PreferenceRunConfig[PreferenceReport]):
    """One run of Direct Preference Optimization: preferred answers become likelier than others."""

    task_class: ClassVar[str] = "pacatune.training.preference:DpoTask"

    task: Literal["dpo"] = "dpo"
    """What to do: Direct Preference Optimization."""

    training: DpoTrainingConfig = field(default_factory=DpoTrainingConfig)
    """Every option of TRL's DPOConfig."""


@dataclass(kw_only=True)
class KtoRunConfig(PreferenceRunConfig[JudgedReport]):
    """One run of Kahneman-Tversky Optimization: each answer is desirable or not."""

    task_class: ClassVar[str] = "pacatune.training.preference:KtoTask"

    task: Literal["kto"] = "kto"
    """What to do: Kahneman-Tversky Optimization."""

    training: KtoTrainingConfig = field(default_factory=KtoTrainingConfig)
    """Every option of TRL's KTOConfig."""


@dataclass(kw_only=True)
class RewardRunConfig(LanguageRunConfig[RewardModelReport]):
    """One run of a reward model: a new head scores answers, preferred ones higher."""

    task_class: ClassVar[str] = "pacatune.training.preference:RewardTask"

    task: Literal["reward"] = "reward"
    """What to do: train a reward model."""

    data: PreferenceDataConfig
    """Pairs of answers."""

    training: RewardTrainingConfig = field(default_factory=RewardTrainingConfig)
    """Every option of TRL's RewardConfig."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_dropout(self)
