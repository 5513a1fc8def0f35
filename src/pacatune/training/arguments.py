"""The training options whose defaults are the same for every recipe."""

from dataclasses import dataclass, fields

from transformers.trainer_utils import IntervalStrategy, SaveStrategy, SchedulerType

from pacatune.precision import bfloat16_is_fast
from pacatune.training.option_checks import check_ranges, refuse_elsewhere

# Options that every recipe decides elsewhere, and where.
_ELSEWHERE = {
    "resume_from_checkpoint": "use --resume",
    "push_to_hub": "upload the finished folder with `hf upload REPOSITORY FOLDER`",
    "logging_nan_inf_filter": "a run stops at the first loss that is not finite",
}


@dataclass
class SharedDefaults:
    """Put before transformers' or TRL's class of arguments, whose defaults these replace.

    Raises:
        ValueError: If `check_options` refuses one.
    """

    output_dir: str | None = "pacatune-run"
    """Folder of the run and its results."""

    num_train_epochs: float = 1.0
    """Number of passes over the training data."""

    learning_rate: float | None = None
    """Peak learning rate; where null, that of the method."""

    lr_scheduler_type: SchedulerType | str = "cosine"
    """Shape of the learning rate over the run: cosine, linear, constant, ..."""

    warmup_steps: float = 0.03
    """Steps in which the learning rate rises; below 1, a share of all steps."""

    bf16: bool | None = None
    """bfloat16 mixed precision; where null, if the device computes in it fast."""

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
    """When to evaluate: steps, epoch or no."""

    eval_steps: float | None = 0.2
    """Steps between evaluations; below 1, a share of all steps."""

    save_strategy: SaveStrategy | str = "steps"
    """When to save checkpoints: steps, epoch, best or no."""

    save_steps: float = 0.2
    """Steps between checkpoints; below 1, a share of all steps."""

    save_total_limit: int | None = 2
    """Number of checkpoints kept."""

    def check_options(self) -> None:
        """Refuse options that no recipe offers, and numbers that train nothing."""
        refuse_elsewhere(self, _ELSEWHERE)
        check_ranges(self)

    def __post_init__(self) -> None:
        # As given, before TRL and transformers resolve them: what a saved config must say.
        self.given = {f.name: getattr(self, f.name) for f in fields(self) if f.init}
        self.check_options()
        if self.bf16 is None:
            # Pinned, so that a saved config gives the same numbers on another machine.
            self.bf16 = not self.fp16 and bfloat16_is_fast(use_cpu=self.use_cpu)  # type: ignore[attr-defined]
            self.given["bf16"] = self.bf16
        if not _has_accelerator():
            # Unless it is said, transformers takes no bf16, and accelerate takes each of several
            # processes for the only one.
            self.use_cpu = True
        super().__post_init__()  # type: ignore[misc]
        if self.use_cpu:
            self.dataloader_pin_memory = False


def own_options(training_class: type) -> set[str]:
    """Return the names of the options that a class of ours declares, with our defaults."""
    ours = (kind for kind in training_class.__mro__ if kind.__module__.startswith("pacatune."))
    return {name for kind in ours for name in vars(kind).get("__annotations__", {})}


def _has_accelerator() -> bool:
    import torch

    return torch.accelerator.is_available()
