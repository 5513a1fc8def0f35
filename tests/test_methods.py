"""The table of methods, and who reads it."""

import pytest

from pacatune.measure.setting import Setting
from pacatune.methods import (
    CLASSIFIER_METHODS,
    METHODS,
    TEXT_METHODS,
    adapter_config,
    method_of,
    size_options,
)
from pacatune.training.tasks import TASKS


def test_a_method_that_is_not_offered():
    with pytest.raises(ValueError, match=r"`method` \('qlora'\) must be one of"):
        method_of("qlora", CLASSIFIER_METHODS)


@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if method.has_adapter])
def test_every_adapter_has_its_configuration(name):
    method = METHODS[name]
    config = adapter_config(method, **size_options(method, 4, 8, method.dropout or 0.0))
    assert (config.oft_block_size if name == "oft" else config.r) == 4
    assert type(config).__name__ == method.config
    assert getattr(config, "paca_alpha", None) == (8 if method.is_paca else None)
    assert getattr(config, "lora_alpha", None) == (8 if method.has_dropout else None)
    assert getattr(config, "alpha", None) == (8 if name == "gralora" else None)
    assert getattr(config, "use_dora", False) == (name == "dora")
    dropout = (method.dropout or 0) if method.has_dropout else None
    assert getattr(config, "lora_dropout", None) == dropout


def test_options_that_a_class_does_not_have():
    row = METHODS["shira"]
    assert adapter_config(row, r=4, lora_alpha=8, lora_dropout=0.0, rank_pattern={}).r == 4
    with pytest.raises(ValueError, match=r"`lora_dropout` \(0.1\): SHiRA has no such option; drop"):
        adapter_config(row, r=4, lora_dropout=0.1)


def test_every_command_that_trains_or_measures_takes_every_name_that_it_offers():
    for name in TEXT_METHODS:
        assert Setting(model="llama3-8b", method=name).row.sections == METHODS[name].sections
    assert set(TASKS["sft"].methods) == set(TEXT_METHODS)
    assert set(TASKS["classifier"].methods) == set(CLASSIFIER_METHODS)
