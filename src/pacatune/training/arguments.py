"""The training options whose defaults are the same for every task, and what they may be."""

import copy
import math
from dataclasses import dataclass, fields
from functools import cache
from pkgutil import resolve_name
from typing import Any, ClassVar

from transformers import TrainingArguments
from transformers.trainer_utils import IntervalStrategy, SaveStrategy, SchedulerType

from pacatune.precision import bfloat16_is_fast
from pacatune.training.tasks import TASKS

_ABOVE_ZERO = (
    *("learning_rate", "head_learning_rate", "max_length", "save_total_limit"),
    *("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"),
    *("logging_steps", "eval_steps", "save_steps"),
)
_HUB = (
    *("push_to_hub", "hub_model_id", "hub_strategy", "hub_token", "hub_private_repo"),
    *("hub_always_push", "hub_revision"),
)


@dataclass
class SharedDefaults:
    """Put before transformers' or TRL's class of arguments, whose defaults these replace.

    An object holds the options as they are set; `resolved` makes a trainer's arguments of them,
    for which transformers sets up the process.
    """

    elsewhere: ClassVar[dict[str, str]] = {
        "resume_from_checkpoint": "use --resume",
        "fp16_full_eval": "it rounds the weights that are saved",
        "bf16_full_eval": "it rounds the weights that are saved",
        "logging_nan_inf_filter": "a run stops at the first loss that is not finite",
        "trust_remote_code": "code of a model is never executed; use a converted model",
        "remove_unused_columns": "the data has the columns that training needs",
        **dict.fromkeys(_HUB, "upload the finished folder by `hf upload`"),
    }
    """Option that must keep its default -> where it is decided, or why it is not offered."""

    output_dir: str | None = "pacatune-run"
    """Folder of the run and its results."""

    num_train_epochs: float = 1.0
    """Number of passes over the training data."""

    learning_rate: float | None = None
    """Peak learning rate; where null, that of the method: 5e-4 paca and qpaca, 1e-5 full, 2e-4 the
    others, and for dpo and kto a tenth of it; for grpo and rloo 1e-6 full, 1e-3 the others; for
    classifiers 1e-4 full, 3e-3 head, 1e-3 the others."""

    lr_scheduler_type: SchedulerType | str = "cosine"
    """Shape of the learning rate over the run: cosine, linear, constant, ..."""

    warmup_steps: float = 0.03
    """Steps in which the learning rate rises from 0; below 1, a share of all steps. Where the share
    is a single step, its rate is half of the peak: with 0 it would train nothing."""

    bf16: bool | None = None
    """bfloat16 mixed precision; null: on if the device has fast bfloat16."""

    gradient_checkpointing: bool | None = None
    """Recompute activations in backward: less memory, more time. Off where null."""

    use_cpu: bool = False
    """Train on the CPU even where there is an accelerator."""

    report_to: str | list[str] | None = "tensorboard"
    """Where to log: tensorboard, wandb, trackio, ... or none."""

    logging_steps: float = 0.01
    """Steps between logs; below 1, a share of all steps."""

    logging_first_step: bool = True
    """Log the first step too."""

    logging_nan_inf_filter: bool = False
    """Not offered: a run stops at the first loss that is not finite."""

    eval_strategy: IntervalStrategy | str = "steps"
    """When to evaluate: steps or epoch, and then before and after training too; or no: never, and
    no data is held out."""

    eval_steps: float | None = 0.2
    """Steps between evaluations; below 1, a share of all steps."""

    save_strategy: SaveStrategy | str = "steps"
    """When to save checkpoints: steps, epoch, best or no."""

    save_steps: float = 0.2
    """Steps between checkpoints; below 1, a share of all steps."""

    save_total_limit: int | None = 2
    """Number of checkpoints kept."""

    def __post_init__(self) -> None:
        """Refuse options that the task does not offer, or that need a GPU."""
        for option in fields(self):
            value = getattr(self, option.name)
            if option.name in self.elsewhere and value != option.default:
                instead = self.elsewhere[option.name]
                raise ValueError(f"`training.{option.name}` ({value!r}) is not offered: {instead}.")
        for name in ("fp16", "activation_offloading"):
            if self.use_cpu and getattr(self, name, False):
                raise ValueError(f"`training.{name}` (True) needs a GPU; drop it on a CPU.")

    def refuse_nothing(self) -> None:
        """Refuse numbers with which nothing is trained, which transformers takes or fails on."""
        values = vars(self)
        length = "num_train_epochs" if values["max_steps"] == -1 else "max_steps"
        for name in (*_ABOVE_ZERO, length):
            value = values.get(name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"`training.{name}` ({value}) must be above 0; raise it.")

    def pin_bf16(self) -> None:
        """Say whether to use bfloat16, so that a saved configuration gives the same elsewhere."""
        if self.bf16 is None:
            self.bf16 = not vars(self).get("fp16") and bfloat16_is_fast(use_cpu=self.use_cpu)

    def resolved(self) -> Any:
        """Return a copy as a trainer takes it: filled in and checked by transformers and TRL."""
        import torch

        arguments = copy.deepcopy(self)
        if not torch.accelerator.is_available():
            # Unless it is said, transformers takes no bf16, and accelerate takes each of several
            # processes for the only one.
            arguments.use_cpu = True
        arguments.refuse_nothing()
        arguments.pin_bf16()
        super(SharedDefaults, arguments).__post_init__()  # type: ignore[misc]
        return arguments


@dataclass
class ClassifierTrainingConfig(SharedDefaults, TrainingArguments):
    """Every option of transformers' TrainingArguments, with these defaults."""

    warmup_steps: float = 0.1
    """Steps in which the learning rate rises; below 1, a share of all steps. A new head
    starts random, and so do the gradients that it sends to the other layers."""

    head_learning_rate: float | None = None
    """Peak learning rate of a new head, which starts random; where null, 3e-3 beside any method,
    and `learning_rate` where the head alone is trained. A head that the model has trains as the
    rest."""

    per_device_train_batch_size: int = 16
    """Texts per device and step."""

    per_device_eval_batch_size: int = 64
    """Texts per device and evaluation step."""


@cache
def training_class(task: str) -> type[Any]:
    """Return the class of a task's section `training`: the trainer's, with our defaults before."""
    spec = TASKS[task]
    theirs: type[Any] = resolve_name(spec.arguments)
    if issubclass(theirs, SharedDefaults):
        return theirs
    name = "TrainingConfig" if task == "sft" else f"{task.capitalize()}TrainingConfig"
    members = {
        "__doc__": f"Every option of {theirs.__name__}, with the defaults of ours.",
        "__module__": __name__,
        "elsewhere": {**SharedDefaults.elsewhere, **spec.refuse},
    }
    return dataclass(type(name, (SharedDefaults, theirs), members))


def __getattr__(name: str) -> type[Any]:
    """Return `TrainingConfig`, `DpoTrainingConfig`, ...: what is pickled is found by its name."""
    task = name.removesuffix("TrainingConfig").lower() or "sft"
    if not name.endswith("TrainingConfig") or task not in TASKS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return training_class(task)


def own_options(training_class: type) -> set[str]:
    """Return the names of the options that a class of ours declares, with our defaults."""
    ours = (kind for kind in training_class.__mro__ if kind.__module__.startswith("pacatune."))
    return {name for kind in ours for name in vars(kind).get("__annotations__", {})}
