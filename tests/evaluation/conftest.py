"""A tiny model with room for long prompts, and MMLU's bundled questions as a folder of tasks."""

import copy

import pytest

from tests.conftest import build_model
from tests.evaluation.mmlu import write_mmlu


@pytest.fixture(scope="session")
def model(tiny_tokenizer):
    return build_model(len(tiny_tokenizer), max_position_embeddings=4096)


@pytest.fixture
def tokenizer(tiny_tokenizer):
    return copy.deepcopy(tiny_tokenizer)


@pytest.fixture(scope="session")
def tasks_dir(tmp_path_factory):
    """Not to be changed."""
    return write_mmlu(tmp_path_factory.mktemp("mmlu") / "tasks")
