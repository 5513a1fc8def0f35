"""Fixtures of the adapter tests."""

import pytest
import torch
import transformers
from peft import PeftModel

from pacatune.adapters import export
from pacatune.adapters.base import load_base
from pacatune.adapters.probe import run_probe
from tests.adapters.fixtures import (
    adapter_copy,
    adapter_dir,
    forked_plain_peft,
    lora_dir,
    model_copy,
)

__all__ = ["adapter_copy", "adapter_dir", "forked_plain_peft", "lora_dir", "model_copy"]


@pytest.fixture
def model(tiny_model_dir):
    return load_base(str(tiny_model_dir), task_type="CAUSAL_LM")


@pytest.fixture
def verified_here(monkeypatch):
    """Let exports be verified in this process, in a tenth of the time; test_export has the new one.

    PEFT's LoRA is PEFT's own here as well.
    """

    def run(base, model_class, lora_folder, inputs, quantization=None, num_labels=None):
        assert quantization is None
        assert num_labels is None
        model = getattr(transformers, model_class).from_pretrained(base, dtype=torch.float32)
        return run_probe(PeftModel.from_pretrained(model, lora_folder).eval(), inputs)

    monkeypatch.setattr(export, "_run_plain_peft", run)
