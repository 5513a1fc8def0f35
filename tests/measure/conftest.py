"""A tiny setting, the same in all tests of the benchmark."""

import pytest

from pacatune.measure.models import llama_values
from pacatune.measure.setting import BenchConfig
from tests.forks import server

HIDDEN, MLP, NUM_LAYERS, VOCAB, RANK = 32, 48, 2, 64, 4


@pytest.fixture(autouse=True, scope="package")
def _measured_in_forks():
    """What is measured in a child finds more imported than the server of `bench` alone has."""
    server()


@pytest.fixture
def values():
    return llama_values(HIDDEN, NUM_LAYERS, num_heads=2, intermediate_size=MLP, vocab_size=VOCAB)


@pytest.fixture
def make_config(values):
    def make(**options):
        settings = {
            "values": values,
            "title": "tiny",
            "methods": ("paca", "lora"),
            "tokens": (6,),
            "rank": RANK,
            "seconds": 0.0,
            "min_rounds": 2,
            "warmup": 1,
            "device": "cpu",
            "dtype": "float32",
            "threads": 1,
        }
        return BenchConfig(**{**settings, **options})

    return make
