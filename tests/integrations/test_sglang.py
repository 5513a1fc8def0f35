"""SGLang's loader on a plain model; with SGLang itself it was not run."""

import pytest

from pacatune.integrations.sglang import LOADER, load, named_tensors
from pacatune.sync import ColumnSource
from tests.sync.conftest import adapt, assert_bits, clone, merged, served, step


def test_loader_has_this_name():
    assert f"{load.__module__}.{load.__name__}" == LOADER


def test_columns_are_loaded():
    model, server = adapt(), served()
    source = ColumnSource(model)
    load(server, named_tensors(source.positions()))
    for seed in range(2):
        load(server, named_tensors(source.columns()))
        assert_bits(server, merged(model))
        step(model, seed=seed)


def test_columns_without_positions():
    server = served()
    before = clone(server)
    with pytest.raises(ValueError, match="no positions are known"):
        load(server, named_tensors(ColumnSource(adapt()).columns()))
    assert_bits(server, before)
