"""What the numbers among the training options may be. This module imports nothing heavy."""

import math
from typing import Any

_ABOVE_ZERO = (
    "learning_rate",
    "per_device_train_batch_size",
    "per_device_eval_batch_size",
    "gradient_accumulation_steps",
    "eval_accumulation_steps",
    "max_length",
    "logging_steps",
    "eval_steps",
    "save_steps",
    "save_total_limit",
    "adam_epsilon",
    "dataset_num_proc",
    "dataloader_prefetch_factor",
)
_FROM_ZERO = (
    "weight_decay",
    "max_grad_norm",
    "warmup_steps",
    "eval_delay",
    "dataloader_num_workers",
    "neftune_noise_alpha",
)
_BELOW_ONE = ("adam_beta1", "adam_beta2", "label_smoothing_factor")


def check_ranges(training: Any) -> None:
    """Refuse numbers that PyTorch and transformers would refuse when weights are loaded, or never.

    Not every task has all of these options.
    """
    if training.max_steps != -1 and training.max_steps < 1:
        raise ValueError(
            f"`training.max_steps` ({training.max_steps}) must be above 0, or -1: then "
            "`training.num_train_epochs` decides."
        )
    epochs = () if training.max_steps > 0 else ("num_train_epochs",)
    for names, fits, rule in (
        ((*_ABOVE_ZERO, *epochs), lambda value: 0 < value < math.inf, "above 0; raise it"),
        (_FROM_ZERO, lambda value: 0 <= value < math.inf, "at least 0; 0 is off"),
        (_BELOW_ONE, lambda value: 0 <= value < 1, "in [0, 1)"),
        (("seed",), lambda value: 0 <= value < 2**32, "in [0, 2^32)"),
    ):
        for name in names:
            value = getattr(training, name, None)
            if value is not None and not fits(value):
                raise ValueError(f"`training.{name}` ({value}) must be {rule}.")
