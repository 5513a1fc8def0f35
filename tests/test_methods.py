"""The table of methods, and who reads it."""

import re
from pathlib import Path

import pytest

import pacatune
from pacatune.measure.setting import Setting
from pacatune.methods import (
    CLASSIFIER_METHODS,
    METHODS,
    TEXT_METHODS,
    adapter_config,
    method_of,
    readers_of,
    size_options,
)
from pacatune.training.tasks import TASKS


def test_a_hyphen_stands_for_an_underscore():
    assert method_of("lora-dropout") is METHODS["lora_dropout"]
    assert method_of("lora_dropout").variant_of == "lora"


def test_an_unknown_name_is_refused_with_the_nearest():
    with pytest.raises(ValueError, match=r"^`method` \('qpacca'\) must be one of .*'qpaca'\?$"):
        method_of("qpacca")
    with pytest.raises(ValueError, match=r"^`arm` \('sgd'\) must be one of lora, dora\.$"):
        method_of("sgd", ("lora", "dora"), option="arm")
    with pytest.raises(ValueError, match=r"`method` \('qlora'\) must be one of"):
        method_of("qlora", CLASSIFIER_METHODS)


def test_variants_are_other_methods_with_an_option_set():
    for method in METHODS.values():
        is_variant = method.quantization is not None or method.dropout is not None
        assert (method.variant_of in METHODS) == is_variant
        if is_variant:
            assert METHODS[method.variant_of].sections == method.sections


def test_sections_have_their_readers():
    assert readers_of("paca") == ("paca", "qpaca")
    others = {"dora", "shira", "gralora", "miss", "oft", "qlora"}
    assert set(readers_of("lora")) == {"lora", "lora_dropout", *others}


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


def test_no_other_table_of_methods():
    """A literal collection of more than three of their names has its home in the table."""
    root = Path(pacatune.__file__).parent
    name = "|".join(METHODS)
    literal = re.compile(rf'(?:"(?:{name})"(?::[^,\n]*)?,\s*){{3,}}"(?:{name})"')
    found = {
        str(path.relative_to(root))
        for path in root.rglob("*.py")
        if literal.search(path.read_text(encoding="utf-8"))
    }
    assert found == set()
