"""A tiny model with room for long prompts, and MMLU's bundled questions as a folder of tasks."""

import pytest
import torch

from tests.conftest import build_model
from tests.evaluation.mmlu import write_mmlu


@pytest.fixture(scope="session")
def model(tiny_tokenizer):
    return build_model(len(tiny_tokenizer), max_position_embeddings=4096)


@pytest.fixture(scope="session")
def tasks_dir(tmp_path_factory):
    """Not to be changed."""
    return write_mmlu(tmp_path_factory.mktemp("mmlu") / "tasks")


def log_likelihood(model, tokenizer, context, continuation, **options):
    """The log-likelihood of a text after another, in plain PyTorch."""
    start = len(tokenizer(context, **options)["input_ids"])
    ids = tokenizer(context + continuation, return_tensors="pt", **options)["input_ids"]
    with torch.no_grad():
        log_probs = model(ids).logits[0].log_softmax(-1)
    return sum(log_probs[k - 1, ids[0, k]].item() for k in range(start, ids.shape[1]))
