"""Training options of TRL and transformers that cannot be taken as they are."""

import math
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import torch
from trl import SFTConfig

# Options of SFTConfig that this recipe decides elsewhere, and where.
_ELSEWHERE = {
    "chat_template_path": "set `data.chat_template`",
    "dataset_text_field": "name the column 'text'",
    "dataset_kwargs": "data is always prepared before the model is loaded",
    "completion_only_loss": "set `data.loss` to completion or all",
    "assistant_only_loss": "set `data.loss` to completion or all",
    "trust_remote_code": "code of a model is never executed; use a converted model",
    "truncation_mode": "examples are cut at their end; shorten them yourself",
    "remove_unused_columns": "the data has the columns that training needs",
}
_MODEL_ARGUMENTS = {
    "trust_remote_code": "code of a model is never executed",
    "dtype": "set `model.dtype`",
    "torch_dtype": "set `model.dtype`",
    "revision": "set `model.revision`",
    "attn_implementation": "set `model.attn_implementation`",
}

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


def refuse_foreign_options(training: SFTConfig) -> None:
    """Refuse options that this recipe decides elsewhere or does not offer.

    Raises:
        ValueError: Says where it is decided.
    """
    refuse_elsewhere(training, _ELSEWHERE)
    for name in training.model_init_kwargs or {}:
        if name in _MODEL_ARGUMENTS:
            raise ValueError(
                f"`training.model_init_kwargs` has {name!r}, which is not offered: "
                f"{_MODEL_ARGUMENTS[name]}."
            )
    on_cpu = training.use_cpu or torch.accelerator.current_accelerator() is None
    if training.activation_offloading and on_cpu:
        raise ValueError(
            "`training.activation_offloading` (True) moves activations off an accelerator, and "
            "this run is on the CPU; drop it."
        )
    if training.packing and training.packing_strategy == "wrapped":
        raise ValueError(
            "`training.packing_strategy` ('wrapped') lets examples attend to each other; "
            "use 'bfd' or 'bfd_split'."
        )


def refuse_elsewhere(training: Any, elsewhere: Mapping[str, str]) -> None:
    """Refuse options that have another value than their default.

    Args:
        training: The arguments.
        elsewhere: Option -> where it is decided, or why it is not offered.

    Raises:
        ValueError: Names the first.
    """
    defaults = {f.name: f.default for f in fields(training)}
    for name, instead in elsewhere.items():
        value = getattr(training, name)
        if value != defaults[name]:
            raise ValueError(f"`training.{name}` ({value!r}) is not offered: {instead}.")


def check_ranges(training: Any) -> None:
    """Refuse numbers that train nothing or mean nothing.

    PyTorch and transformers would find these only when the weights are loaded, or never.

    Raises:
        ValueError: Names the first.
    """
    if training.max_steps != -1 and training.max_steps < 1:
        raise ValueError(
            f"`training.max_steps` ({training.max_steps}) must be above 0, or -1: then "
            "`training.num_train_epochs` decides."
        )
    epochs = () if training.max_steps > 0 else ("num_train_epochs",)
    for name in (*_ABOVE_ZERO, *epochs):
        value = getattr(training, name, None)
        if value is not None and not 0 < value < math.inf:
            raise ValueError(f"`training.{name}` ({value}) must be above 0; raise it.")
    for name in _FROM_ZERO:
        value = getattr(training, name, None)
        if value is not None and not 0 <= value < math.inf:
            raise ValueError(f"`training.{name}` ({value}) must be at least 0; 0 is off.")
    for name in _BELOW_ONE:
        value = getattr(training, name, None)
        if value is not None and not 0 <= value < 1:
            raise ValueError(f"`training.{name}` ({value}) must be in [0, 1).")
    if not 0 <= training.seed < 2**32:
        raise ValueError(f"`training.seed` ({training.seed}) must be in [0, 2^32).")
