"""What matches nothing is refused, whatever the method."""

import pytest
from peft import LoraConfig, get_peft_model

from pacatune import PacaConfig
from pacatune.tuner.ignored import put_adapter
from tests.conftest import build_model


@pytest.fixture
def model():
    return build_model(64)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"rank_pattern": {"q_prj": 2}},
            r"'q_prj' matches nothing .* did you mean 'q_proj'\? There are q_proj, v_proj\.",
        ),
        ({"alpha_pattern": {"k_proj": 2}}, r"`alpha_pattern`: 'k_proj' matches nothing that is ad"),
        (
            {"rank_pattern": {"q_proj": 2, r"0\.self_attn\.q_proj": 4}},
            "q_proj' is never used, since 'q_proj', which comes before",
        ),
        (
            {"layers_to_transform": [0, 7]},
            r"\[7\] are no layers with targets.*adapted layers are \[0\]",
        ),
    ],
)
@pytest.mark.parametrize("kind", [PacaConfig, LoraConfig])
def test_patterns(model, kind, options, message):
    config = kind(r=4, target_modules=["q_proj", "v_proj"], **options)
    before = [name for name, _ in model.named_modules()]
    with pytest.raises(ValueError, match=message):
        (get_peft_model if kind is PacaConfig else put_adapter)(model, config)
    if kind is PacaConfig:
        assert [name for name, _ in model.named_modules()] == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_modules": ["q_proj", "v_prj"]}, r"`target_modules` names 'v_prj'.*mean 'v_proj'"),
        ({"modules_to_save": ["lm_hed"]}, r"`modules_to_save` names 'lm_hed'.*you mean 'lm_head'"),
        ({"exclude_modules": ["mlp.dwn_proj"]}, r"`exclude_modules` names.* mean 'down_proj'\?"),
        ({"exclude_modules": r".*\.nosuch"}, r"`exclude_modules` \('.*nosuch'\) matches no module"),
    ],
)
def test_names(model, options, message):
    options = {"target_modules": ["q_proj", "v_proj"], **options}
    with pytest.raises(ValueError, match=message):
        put_adapter(model, LoraConfig(r=4, **options))


@pytest.mark.parametrize("kind", [PacaConfig, LoraConfig])
def test_what_matches_passes(model, kind):
    config = kind(
        r=4,
        target_modules=r".*\.(q_proj|v_proj)",
        exclude_modules=[r"layers.1.self_attn.q_proj"],
        rank_pattern={r"0\.self_attn\.q_proj": 2, "v_proj": 3},
        alpha_pattern={".*q_proj": 3},
        modules_to_save=["lm_head"],
        task_type="CAUSAL_LM",
    )
    put_adapter(model, config)
