"""The table of what `pacatune train --task` does. This module imports nothing heavy."""

from collections.abc import Mapping
from importlib import import_module
from typing import Any

DEFAULT_TASK = "sft"

TASKS: Mapping[str, str] = {
    "sft": "pacatune.training.config.RunConfig",
    "dpo": "pacatune.training.preference_config.DpoRunConfig",
    "kto": "pacatune.training.preference_config.KtoRunConfig",
    "reward": "pacatune.training.preference_config.RewardRunConfig",
    "grpo": "pacatune.training.rl_config.GrpoRunConfig",
    "rloo": "pacatune.training.rl_config.RlooRunConfig",
}
"""Name -> `module.Class` of its configuration."""


def run_class_of(task: str) -> Any:
    """Return the class of the configuration of a task."""
    module, _, name = TASKS[task].rpartition(".")
    return getattr(import_module(module), name)
