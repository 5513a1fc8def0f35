"""Fixtures of the command tests."""

from tests.adapters.fixtures import (
    adapter_copy,
    adapter_dir,
    forked_plain_peft,
    lora_dir,
    model_copy,
)

__all__ = ["adapter_copy", "adapter_dir", "forked_plain_peft", "lora_dir", "model_copy"]
