"""Training options of TRL and transformers that cannot be taken as they are."""

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
    """Refuse numbers with which nothing would be trained.

    Raises:
        ValueError: Names the first.
    """
    # PyTorch and transformers would find these only when the weights are loaded, or never.
    names = ["per_device_train_batch_size", "per_device_eval_batch_size"]
    names += ["gradient_accumulation_steps"]
    if training.max_steps <= 0:
        names.append("num_train_epochs")
    if getattr(training, "max_length", None) is not None:
        names.append("max_length")
    for name in names:
        value = getattr(training, name)
        if not value > 0:
            raise ValueError(f"`training.{name}` ({value}) must be above 0; raise it.")
