"""The table of what `pacatune train --task` does. This module imports nothing heavy.

A new task of TRL is a row and, where its data is of a new kind, one function that prepares it.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from pacatune.data.config import (
    DataConfig,
    DataSection,
    PreferenceDataConfig,
    PromptDataConfig,
    TextClassConfig,
)
from pacatune.methods import CLASSIFIER_METHODS, TEXT_METHODS

DEFAULT_TASK = "sft"
_CUT = "examples are cut at their end; shorten them yourself"
_REFERENCE = {"sync_ref_model": "the reference is the pretrained model, with the adapter off"}
_TEMPLATE = {"chat_template_path": "set `data.chat_template`"}


class ModelKind(NamedTuple):
    """What a model does, in the words of transformers, PEFT and the hub."""

    auto_class: str
    """Class of transformers that loads it."""
    task_type: str | None
    pipeline_tag: str


WRITER = ModelKind("AutoModelForCausalLM", "CAUSAL_LM", "text-generation")
READER = ModelKind("AutoModelForSequenceClassification", "SEQ_CLS", "text-classification")


@dataclass(frozen=True, kw_only=True)
class TaskSpec:
    """What tells one task from another, known without torch.

    `trainer` and `arguments` are named as `module.name`, since they import torch and TRL.
    """

    trainer: str
    """A `RunTrainer`, mostly put before TRL's class, whose `prepare` reads the data."""
    arguments: str
    """TRL's or transformers' class of arguments, or one of ours that begins with
    `SharedDefaults`."""
    data: type[DataSection]
    """Class of the section `data`."""
    kind: ModelKind = WRITER
    methods: Collection[str] = TEXT_METHODS
    rate_share: float = 1.0
    """Learning rates where a run says none, as a share of those of `METHODS`."""
    adapter_rate: float | None = None
    """The learning rate of every adapter where a run says none, in place of such a share."""
    refuse: Mapping[str, str] = field(default_factory=dict)
    """Training option that must keep its default -> where it is decided, or why."""
    reference: str | None = None
    """Training option without which the model, its adapter off, is asked as a reference."""
    loss_per: str = "learned token"
    """What losses are means over."""
    metrics: Mapping[str, str] = field(default_factory=dict)
    """Held-out metric beside the loss, by the trainer's name -> what reports call it."""

    @property
    def is_of_trl(self) -> bool:
        """Whether TRL has the trainer."""
        return self.arguments.startswith("trl.")

    @property
    def is_rewarded(self) -> bool:
        """Whether rewards, not the loss, say how good the model is."""
        return "reward" in self.metrics

    @property
    def lacks(self) -> tuple[str, ...]:
        """Options of a run outside its sections that only other tasks have."""
        has_none = self.methods is CLASSIFIER_METHODS
        return (*(["adapter"] if has_none else []), *([] if self.is_rewarded else ["reward"]))


def _on_rewards(name: str) -> TaskSpec:
    return TaskSpec(
        trainer=f"pacatune.training.rl.{name}SamplingTrainer",
        arguments=f"trl.{name}Config",
        data=PromptDataConfig,
        rate_share=0.1,
        adapter_rate=1e-3,
        refuse=_REFERENCE
        | {
            "chat_template_kwargs": "set `data.chat_template_kwargs`",
            "use_transformers_continuous_batching": "TRL casts the trained weights for it",
            "use_transformers_paged": "TRL casts the trained weights for it",
            "log_completions_hub_repo": "set `training.log_completions` and upload them yourself",
        },
        reference="beta",
        metrics={
            "reward": "held-out reward",
            "completions/mean_length": "tokens per answer",
        },
    )


TASKS: dict[str, TaskSpec] = {
    "sft": TaskSpec(
        trainer="pacatune.training.sft.TextTrainer",
        arguments="trl.SFTConfig",
        data=DataConfig,
        refuse=_TEMPLATE
        | {
            "dataset_text_field": "name the column 'text'",
            "dataset_kwargs": "data is always prepared before the model is loaded",
            "completion_only_loss": "set `data.loss` to completion or all",
            "assistant_only_loss": "set `data.loss` to completion or all",
            "truncation_mode": _CUT,
        },
    ),
    "dpo": TaskSpec(
        trainer="pacatune.training.preference.PairTrainer",
        arguments="trl.DPOConfig",
        data=PreferenceDataConfig,
        rate_share=0.1,
        refuse=_REFERENCE | {"truncation_mode": _CUT},
        reference="precompute_ref_log_probs",
        loss_per="pair",
        metrics={
            "rewards/margins": "held-out reward margin",
            "rewards/accuracies": "held-out accuracy",
        },
    ),
    "kto": TaskSpec(
        trainer="pacatune.training.preference.JudgedTrainer",
        arguments="trl.KTOConfig",
        data=PreferenceDataConfig,
        rate_share=0.1,
        refuse=_REFERENCE,
        reference="precompute_ref_log_probs",
        loss_per="answer",
        metrics={"rewards/margins": "held-out reward margin"},
    ),
    "reward": TaskSpec(
        trainer="pacatune.training.preference.ScoreTrainer",
        arguments="trl.RewardConfig",
        data=PreferenceDataConfig,
        kind=READER,
        refuse=_TEMPLATE,
        loss_per="pair",
        metrics={"margin": "held-out margin", "accuracy": "held-out accuracy"},
    ),
    "grpo": _on_rewards("GRPO"),
    "rloo": _on_rewards("RLOO"),
    "classifier": TaskSpec(
        trainer="pacatune.training.classifier.ClassTrainer",
        arguments="pacatune.training.arguments.ClassifierTrainingConfig",
        data=TextClassConfig,
        kind=READER,
        methods=CLASSIFIER_METHODS,
        loss_per="text",
        metrics={"accuracy": "held-out accuracy"},
    ),
}
"""Name -> what it is."""
