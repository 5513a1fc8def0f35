"""A small Llama and something for it to read."""

import pytest
import torch
from transformers import AutoModelForCausalLM


@pytest.fixture
def base(tiny_model_dir):
    return AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32)


@pytest.fixture
def ids():
    return torch.randint(0, 100, (3, 30), generator=torch.Generator().manual_seed(0))
