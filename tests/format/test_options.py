import pytest
from hypothesis import given
from hypothesis import strategies as st
from peft.utils.other import get_pattern_key

from pacatune.format.options import matching_key

_NAMES = ["q_proj", "layers.0.q_proj", "model.layers.10.mlp.q_proj", "xq_proj", "0", ""]
_PATTERNS = ["q_proj", "0.q_proj", r"layers\.\d+\.q_proj", ".*", "q|0", "[a-z]+", "^x", "0$", ""]


@given(st.lists(st.sampled_from(_PATTERNS), unique=True), st.sampled_from(_NAMES))
def test_patterns_match_as_in_peft(patterns, name):
    expected = get_pattern_key(patterns, name)
    found = matching_key(patterns, name)
    assert expected == (name if found is None else found)


@pytest.mark.parametrize(("name", "key"), [("a.q_proj", "q_proj"), ("a.xq_proj", None)])
def test_a_pattern_fits_whole_parts_of_a_name(name, key):
    assert matching_key(["q_proj"], name) == key
