"""Every value of PacaConfig that can be wrong without a model."""

import pytest
from peft import PeftConfig

from pacatune import PacaConfig

NESTED = {}
for _ in range(800):
    NESTED = {"": NESTED}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"r": 0}, r"`r` \(0\) must be an integer of at least 1"),
        ({"r": -3}, r"`r` \(-3\)"),
        ({"r": 2.5}, r"`r` \(2.5\)"),
        ({"r": True}, r"`r` \(True\)"),
        ({"r": "8"}, r"`r` \('8'\)"),
        ({"paca_alpha": float("nan")}, r"`paca_alpha` \(nan\)"),
        ({"paca_alpha": float("inf")}, r"`paca_alpha` \(inf\)"),
        ({"rank_pattern": {"q_proj": 0}}, r"`rank_pattern\['q_proj'\]` \(0\)"),
        ({"alpha_pattern": {"q_proj": "x"}}, r"`alpha_pattern\['q_proj'\]` \('x'\)"),
        ({"paca_alpha": 10**400}, r"`paca_alpha` \(10+\) must be a finite number of 32 bits"),
        ({"paca_alpha": 1e41}, r"`paca_alpha` \(1e\+41\) must be a finite number of 32 bits"),
        ({"random_seed": 1.5}, r"`random_seed` \(1.5\) must be an integer, .* or None to draw one"),
        ({"random_seed": "7"}, r"`random_seed` \('7'\)"),
        ({"random_seed": True}, r"`random_seed` \(True\)"),
        ({"rank_pattern": "q_proj"}, r"`rank_pattern` \('q_proj'\) must be a dictionary"),
        ({"rank_pattern": [["q_proj", 2]]}, r"`rank_pattern` \(\[\['q_proj', 2\]\]\) must be a d"),
        ({"alpha_pattern": 3}, r"`alpha_pattern` \(3\) must be a dictionary"),
        ({"base_quantization": "nf4"}, r"`base_quantization` \('nf4'\) must be a dictionary"),
        ({"base_quantization": {}}, r"`base_quantization` \(\{\}\) must name the `method`"),
        ({"selection_options": [1]}, r"`selection_options` \(\[1\]\) must be a dictionary"),
        ({"selection": ["random"]}, r"`selection` \(\['random'\]\) must be the name of a strategy"),
        ({"target_modules": 5}, r"`target_modules` \(5\) must be a list of names"),
        ({"exclude_modules": [1]}, r"`exclude_modules` \(\[1\]\) must be a list of names"),
        ({"modules_to_save": "head"}, r"`modules_to_save` \('head'\) must be a list of names"),
        ({"layers_to_transform": "0"}, r"`layers_to_transform` \('0'\) must be the number of a"),
        ({"selection_options": NESTED}, "`selection_options` is nested deeper than 8 levels"),
        ({"r": NESTED}, "`r` is nested deeper than 8 levels"),
        ({"task_type": NESTED}, "`task_type` is nested deeper than 8 levels"),
        ({"selection": "best"}, r"`selection` \('best'\) must be one of \['gradient', 'random'"),
        ({"selection": "activation_qr"}, r"`selection` \('activation_qr'\) must be one of"),
        ({"bias": "some"}, r"`bias` \('some'\) must be one of none, all, paca_only"),
        (
            {"target_modules": ["q_proj"], "layers_pattern": "layers"},
            r"`layers_pattern` \('layers'\).* needs `layers_to_transform`",
        ),
    ],
)
def test_wrong_values(options, message):
    with pytest.raises(ValueError, match=message):
        PacaConfig(**options)


def test_wrong_values_of_a_file_are_said_by_peft_too(tmp_path):
    for text, message in (
        ('"rank_pattern": "q"', "dictionary"),
        ('"base_quantization": 4', "dict"),
    ):
        (tmp_path / "adapter_config.json").write_text('{"peft_type": "PACA", ' + text + "}")
        with pytest.raises(ValueError, match=f"must be a {message}"):
            PeftConfig.from_pretrained(str(tmp_path))


@pytest.mark.parametrize(
    "options", [{"paca_alpha": 0}, {"paca_alpha": -4}, {"alpha_pattern": None}]
)
@pytest.mark.parametrize("seed", [None, -1, -(2**70), 2**70])
def test_values_that_pefts_own_takes(options, seed):
    PacaConfig(random_seed=seed, target_modules=".*q", layers_to_transform=[0], **options)


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
