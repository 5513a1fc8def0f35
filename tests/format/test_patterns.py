import pytest
from hypothesis import given
from hypothesis import strategies as st
from peft.utils.other import get_pattern_key

from pacatune import PacaConfig
from pacatune.format.patterns import PATTERN_OPTIONS, check_patterns, matching_key

_NAMES = ["q_proj", "layers.0.q_proj", "model.layers.10.mlp.q_proj", "xq_proj", "0", ""]
_PATTERNS = ["q_proj", "0.q_proj", r"layers\.\d+\.q_proj", ".*", "q|0", "[a-z]+", "^x", "0$", ""]


@given(st.lists(st.sampled_from(_PATTERNS), unique=True), st.sampled_from(_NAMES))
def test_patterns_match_as_in_peft(patterns, name):
    expected = get_pattern_key(patterns, name)
    found = matching_key(patterns, name)
    assert expected == (name if found is None else found)


FINE = [
    r".*decoder.*(SA|MHA).*to_[kqv]$",
    r"model\.layers\.\d+\.(self_attn|mlp)\.(q|k|v)_proj",
    r"^(?!.*lm_head).*",
    r"^(?!.*(?:visual|lm_head)).*(?:q_proj|k_proj|gate_proj|fc1|fc).*",
    r".*layers.[0-9]+.*(q|k|v)_proj.*",
    r"(?:a|b)",
    r"(.*)(q|k|v)_proj",
    r"llm\..*layers\.\d+\.self_attn\.(q_proj|k_proj|v_proj|o_proj)",
    r"^(language_model|thinker\.model)(?=\.).*\.(q_proj|k_proj|up_proj)$",
    r"(?:.*?(?:language|text).*?(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense)"
    r".*?(?:k_proj|v_proj|q_proj|out_proj|fc1|fc2|o_proj|gate_proj|up_proj|down_proj).*?)"
    r"|(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|mlp)\.(?:(?:k_proj|v_proj)))",
    "all-linear",
]


@pytest.mark.parametrize("pattern", FINE)
def test_what_people_write_is_taken(pattern):
    check_patterns({"target_modules": pattern, "exclude_modules": r".*\.lm_head"})


@pytest.mark.parametrize(
    "pattern",
    [
        r"(([a-z_.0-9]+)+)+!",
        r"(?:\w+\.?)*!",
        r"(a?){30}a{30}x",
        r"(?:a|aa)+x",
        r"(?:(?:ab|abc)?){40}x",
        r"(?i)" + r"(?:ab|AB)" * 40 + "x",
        r"(?:a|a)" * 40 + "x",
        r".*.*.*.*.*x",
        r".*[a-z].*[a-z].*[a-z].*[a-z].*x",
        r"(?=(.*.*.*.*.*x))a",
        r"((?:a|a))+x",
        "a?" * 30 + "a" * 30,
        "(?:a|b)?" * 30 + "x",
        r"(a+)(?#b)+x",
        r"(?x)(a+) +x",
        r"([a\](]+)+x",
        r"(.*.*.*)*x",
        r"(?>(a+)+x)",
        r"(?:a+)++x",
        r"((a{0,9}){0,9}){0,9}x",
        r"(a)?(?(1)(b+)+|c)x",
    ],
)
@pytest.mark.parametrize("option", PATTERN_OPTIONS)
def test_what_could_be_tried_for_ever_is_refused(pattern, option):
    value = {pattern: [1]} if option.endswith("pattern") else [pattern, "q_proj"]
    with pytest.raises(ValueError, match=rf"^`{option}` \(.*\) could be tried in more ways than"):
        check_patterns({option: value})


def test_a_configuration_refuses_it_whoever_reads_it():
    """PEFT would match it with the names of all modules."""
    with pytest.raises(ValueError, match=r"`target_modules` \('\(\.\*\.\*\)\*x'\) could be tried"):
        PacaConfig(target_modules="(.*.*)*x")
