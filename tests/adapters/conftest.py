"""Fixtures of the adapter tests."""

import pytest

from pacatune.adapters.base import load_base
from tests.adapters.fixtures import adapter_copy, adapter_dir, lora_dir, model_copy

__all__ = ["adapter_copy", "adapter_dir", "lora_dir", "model_copy"]


@pytest.fixture
def model(tiny_model_dir):
    return load_base(str(tiny_model_dir), task_type="CAUSAL_LM")
