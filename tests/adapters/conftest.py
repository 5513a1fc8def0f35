"""Fixtures of the adapter tests."""

from tests.adapters.fixtures import adapter_copy, adapter_dir, lora_dir, model_copy

__all__ = ["adapter_copy", "adapter_dir", "lora_dir", "model_copy"]
