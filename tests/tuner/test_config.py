"""Every value of PacaConfig that can be wrong without a model."""

import pytest

from pacatune import PacaConfig


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"r": 0}, r"`r` \(0\) must be an integer of at least 1"),
        ({"r": -3}, r"`r` \(-3\)"),
        ({"r": 2.5}, r"`r` \(2.5\)"),
        ({"r": True}, r"`r` \(True\)"),
        ({"r": "8"}, r"`r` \('8'\)"),
        ({"paca_alpha": 0}, r"`paca_alpha` \(0\) must be a finite number above 0"),
        ({"paca_alpha": float("nan")}, r"`paca_alpha` \(nan\)"),
        ({"paca_alpha": float("inf")}, r"`paca_alpha` \(inf\)"),
        ({"rank_pattern": {"q_proj": 0}}, r"`rank_pattern\['q_proj'\]` \(0\)"),
        ({"alpha_pattern": {"q_proj": "x"}}, r"`alpha_pattern\['q_proj'\]` \('x'\)"),
        ({"random_seed": None}, r"`random_seed` \(None\) must be an integer in \[0, 2\^63\)"),
        ({"random_seed": -1}, r"`random_seed` \(-1\)"),
        ({"random_seed": 2**63}, r"`random_seed` \(9223372036854775808\)"),
        (
            {"selection": "best"},
            r"`selection` \('best'\) must be one of \['activation', 'activation_lev",
        ),
        ({"bias": "some"}, r"`bias` \('some'\) must be 'none', 'all' or 'paca_only'"),
        (
            {"target_modules": ".*q_proj", "layers_to_transform": [0]},
            r"`layers_to_transform` \(\[0\]\) cannot be used when `target_modules` is a str",
        ),
        (
            {"target_modules": ["q_proj"], "layers_pattern": "layers"},
            r"`layers_pattern` \('layers'\).* needs `layers_to_transform`",
        ),
    ],
)
def test_wrong_values(options, message):
    with pytest.raises(ValueError, match=message):
        PacaConfig(**options)


def test_layer_zero_is_a_layer():
    config = PacaConfig(target_modules=["q_proj"], layers_to_transform=0, layers_pattern="layers")
    assert config.layers_to_transform == 0


def test_unknown_key():
    with pytest.raises(TypeError, match="rank"):
        PacaConfig(rank=8)


def test_round_trip(tmp_path):
    config = PacaConfig(
        r=3, paca_alpha=2.5, target_modules=["a", "b"], rank_pattern={"a": 2}, bias="all"
    )
    config.save_pretrained(tmp_path)
    loaded = PacaConfig.from_pretrained(tmp_path)
    assert {**vars(loaded), "inference_mode": False} == {**vars(config), "inference_mode": False}
