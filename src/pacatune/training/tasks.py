"""The table of what `pacatune train --task` does. This module imports nothing heavy.

A new task of TRL is a row and, where its data is of a new kind, one function that prepares it.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

from pacatune.methods import CLASSIFIER_METHODS, TEXT_METHODS

DEFAULT_TASK = "sft"
_CUT = "examples are cut at their end; shorten them yourself"
_REFERENCE = {"sync_ref_model": "the reference is the pretrained model, with the adapter off"}


@dataclass(frozen=True, kw_only=True)
class TaskSpec:
    """What tells one task from another. Classes and functions are named as `module.name`."""

    arguments: str
    """TRL's or transformers' class of arguments, or one of ours that begins with
    `SharedDefaults`."""
    data: str
    """Class of the section `data`."""
    rows: str = ""
    """Function that makes examples of rows, or says what is wrong with the first of them."""
    trainer: str = "transformers.Trainer"
    prepare: str = ""
    """Function that reads and encodes the data of a `LanguageTask`, and tells it what else the
    trainer needs; it returns a `PreparedData`."""
    mixin: str = "pacatune.training.language.LanguageTrainer"
    """Class of ours that is put before the trainer."""
    run: str = "pacatune.training.language.LanguageTask"
    """Class of ours that carries the task out."""
    model: str = "pacatune.training.config.ModelConfig"
    """Class of the section `model`."""
    command: str = "train"
    methods: tuple[str, ...] = TEXT_METHODS
    auto_class: str = "AutoModelForCausalLM"
    """Class of transformers that loads the model."""
    task_type: str | None = "CAUSAL_LM"
    """PEFT's name of what the adapted model does."""
    pipeline_tag: str = "text-generation"
    """The hub's name of what it does."""
    tags: tuple[str, ...] = ()
    """Tags of the model card, beside the method's."""
    columns: tuple[str, ...] = ("input_ids", "labels")
    """Columns of the data by which a resumed run knows it again."""
    rate_share: float = 1.0
    """Learning rates where a run says none, as a share of those of `METHODS`."""
    refuse: Mapping[str, str] = field(default_factory=dict)
    """Training option that must keep its default -> where it is decided, or why."""
    reference: str | None = None
    """Training option without which the model, its adapter off, is asked as a reference."""
    fixed_split: str | None = None
    """Why a run must go on with the processes and batches that it began with; None: it need not."""
    loss_per: str = "learned token"
    """What losses are means over."""
    metrics: Mapping[str, str] = field(default_factory=dict)
    """Held-out metric beside the loss, by the trainer's name -> what reports call it."""
    lacks: tuple[str, ...] = ("reward",)
    """Options of a run outside its sections that only other tasks have."""

    @property
    def is_of_trl(self) -> bool:
        """Whether TRL has the trainer."""
        return self.arguments.startswith("trl.")

    @property
    def is_rewarded(self) -> bool:
        """Whether rewards, not the loss, say how good the model is."""
        return "reward" in self.metrics


def _of_trl(name: str, **options: Any) -> TaskSpec:
    """Return the row of TRL's trainer of a name."""
    known = {"arguments": f"trl.{name}Config", "trainer": f"trl.{name}Trainer"}
    return TaskSpec(**{"tags": (name.lower(), "trl"), **known, **options})


def _on_rewards(name: str) -> TaskSpec:
    return _of_trl(
        name,
        data="pacatune.data.PromptDataConfig",
        rows="pacatune.data.prompts.to_prompts",
        prepare="pacatune.training.rl.prepare",
        mixin="pacatune.training.rl.SamplingTrainer",
        columns=("row",),
        rate_share=0.1,
        refuse=_REFERENCE
        | {
            "use_transformers_continuous_batching": "TRL casts the trained weights for it",
            "use_transformers_paged": "TRL casts the trained weights for it",
            "log_completions_hub_repo": "set `training.log_completions` and upload them yourself",
        },
        reference="beta",
        fixed_split="each process samples answers of its own",
        metrics={
            "reward": "held-out reward",
            "completions/mean_length": "tokens per answer",
        },
        lacks=(),
    )


TASKS: dict[str, TaskSpec] = {
    "sft": _of_trl(
        "SFT",
        data="pacatune.data.DataConfig",
        rows="pacatune.data.formats.to_examples",
        prepare="pacatune.training.sft.prepare",
        mixin="pacatune.training.sft.TextTrainer",
        refuse={
            "chat_template_path": "set `data.chat_template`",
            "dataset_text_field": "name the column 'text'",
            "dataset_kwargs": "data is always prepared before the model is loaded",
            "completion_only_loss": "set `data.loss` to completion or all",
            "assistant_only_loss": "set `data.loss` to completion or all",
            "truncation_mode": _CUT,
        },
    ),
    "dpo": _of_trl(
        "DPO",
        data="pacatune.data.PreferenceDataConfig",
        rows="pacatune.data.preference.to_pairs",
        prepare="pacatune.training.preference.prepare_dpo",
        mixin="pacatune.training.preference.PreparedTrainer",
        columns=("prompt_ids", "chosen_ids", "rejected_ids"),
        rate_share=0.1,
        refuse=_REFERENCE | {"truncation_mode": _CUT},
        reference="precompute_ref_log_probs",
        loss_per="pair",
        metrics={
            "rewards/margins": "held-out reward margin",
            "rewards/accuracies": "held-out accuracy",
        },
    ),
    "kto": _of_trl(
        "KTO",
        data="pacatune.data.PreferenceDataConfig",
        rows="pacatune.data.preference.to_judged",
        prepare="pacatune.training.preference.prepare_kto",
        mixin="pacatune.training.preference.PreparedTrainer",
        columns=("prompt_ids", "completion_ids", "label"),
        rate_share=0.1,
        refuse=_REFERENCE,
        reference="precompute_ref_log_probs",
        fixed_split="KTO compares an answer with its neighbour in the batch of a process",
        loss_per="answer",
        metrics={"rewards/margins": "held-out reward margin"},
    ),
    "reward": _of_trl(
        "Reward",
        data="pacatune.data.PreferenceDataConfig",
        rows="pacatune.data.preference.to_pairs",
        prepare="pacatune.training.preference.prepare_reward",
        mixin="pacatune.training.preference.PreparedTrainer",
        auto_class="AutoModelForSequenceClassification",
        task_type="SEQ_CLS",
        pipeline_tag="text-classification",
        tags=("reward-trainer", "trl"),
        columns=("chosen_ids", "rejected_ids"),
        refuse={"chat_template_path": "set `data.chat_template`"},
        loss_per="pair",
        metrics={"margin": "held-out margin", "accuracy": "held-out accuracy"},
    ),
    "grpo": _on_rewards("GRPO"),
    "rloo": _on_rewards("RLOO"),
    "classifier": TaskSpec(
        arguments="pacatune.training.arguments.ClassifierTrainingConfig",
        data="pacatune.data.config.TextClassConfig",
        prepare="pacatune.training.classifier.prepare",
        methods=CLASSIFIER_METHODS,
        auto_class="AutoModelForSequenceClassification",
        task_type="SEQ_CLS",
        pipeline_tag="text-classification",
        rows="pacatune.data.formats.to_texts",
        loss_per="text",
        metrics={"accuracy": "held-out accuracy"},
        lacks=("adapter", "reward"),
    ),
    "image": TaskSpec(
        arguments="pacatune.training.image.config.ImageTrainingConfig",
        model="pacatune.training.image.config.ImageModelConfig",
        data="pacatune.data.config.ImageDataConfig",
        run="pacatune.training.image.task.ImageTask",
        command="train-image",
        methods=CLASSIFIER_METHODS,
        task_type=None,
        pipeline_tag="image-classification",
        loss_per="image",
        lacks=("adapter", "reward"),
    ),
}
"""Name -> what it is."""


def load(name: str) -> Any:
    """Return the class or function that `module.name` names."""
    module, _, attribute = name.rpartition(".")
    return getattr(import_module(module), attribute)
