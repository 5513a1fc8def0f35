"""A small adapted Llama and something for it to read."""

import pytest

from tests.lean.models import adapted, make_batch


@pytest.fixture
def model():
    return adapted()


@pytest.fixture
def batch():
    return make_batch("Llama")
