"""Every value of a configuration that can be wrong without a model."""

import pytest

from pacatune import PacaConfig

NESTED = {}
for _ in range(800):
    NESTED = {"": NESTED}


def test_the_name_that_lora_has_for_it():
    with pytest.raises(TypeError, match=r"'lora_alpha' \(16\); it is `paca_alpha` here"):
        PacaConfig(r=8, lora_alpha=16)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"r": 0}, r"`r` \(0\) must be an integer of at least 1"),
        ({"paca_alpha": float("nan")}, r"`paca_alpha` \(nan\)"),
        ({"rank_pattern": {"q_proj": 0}}, r"`rank_pattern\['q_proj'\]` \(0\)"),
        ({"alpha_pattern": {"q_proj": "x"}}, r"`alpha_pattern\['q_proj'\]` \('x'\)"),
        ({"paca_alpha": 10**400}, r"`paca_alpha` \(10+\) must be a finite number that float32"),
        ({"random_seed": 1.5}, r"`random_seed` \(1.5\) must be an integer, .* or None to draw one"),
        ({"rank_pattern": "q_proj"}, r"`rank_pattern` \('q_proj'\) must be a dictionary"),
        ({"base_quantization": "nf4"}, r"`base_quantization` \('nf4'\) must be a dictionary"),
        ({"base_quantization": {}}, r"`base_quantization` \(\{\}\) must name the `method`"),
        ({"selection_options": [1]}, r"`selection_options` \(\[1\]\) must be a dictionary"),
        ({"selection": ["random"]}, r"`selection` \(\['random'\]\) must be the name of a strategy"),
        ({"target_modules": 5}, r"`target_modules` \(5\) must be a list of names"),
        ({"layers_to_transform": "0"}, r"`layers_to_transform` \('0'\) must be the number of a"),
        ({"selection_options": NESTED}, "`selection_options` is nested deeper than 8 levels"),
        ({"task_type": NESTED}, "`task_type` is nested deeper than 8 levels"),
        ({"selection": "best"}, r"`selection` \('best'\) must be one of \['gradient', 'random'"),
        ({"bias": "some"}, r"`bias` \('some'\) must be one of none, all, paca_only"),
        (
            {"target_modules": ["q_proj"], "layers_pattern": "layers"},
            r"`layers_pattern` .* needs `layers_to_transform`",
        ),
        # Regular expressions; adapters/test_folder.py has those of other fields
        ({"layers_to_transform": [0], "layers_pattern": ["("]}, r"`layers_pattern` \('\('\) is no"),
        ({"modules_to_save": ["+"]}, r"`modules_to_save` \('.*'\) is no regular .*: .*; mend"),
        # Columns
        ({"selection": {}}, r"`columns` \(\{\}\) must be a dictionary of module names and columns"),
        ({"selection": {"up": 3}}, r"`columns\['up'\]` \(3\) must be a list of column numbers"),
        ({"selection": {"up": [-1]}}, r"`columns\['up'\]` \(\[-1\]\) must be a list of column num"),
        ({"selection": {"up": []}}, r"`columns\['up'\]` \(\[\]\) must be a list"),
        ({"selection": {"up": [1, 1]}}, r"`columns\['up'\]` \(\[1, 1\]\) repeats a column"),
        ({"selection": {"up": [1]}, "columns": {"up": [1]}}, "`columns` is set too; give one"),
        ({"selection": "fixed"}, r"`selection` \('fixed'\) needs columns; give them as"),
        # Rates
        ({"use_rslora": 1}, "`use_rslora` .1. must be true or false"),
    ],
)
def test_wrong_values(options, message):
    with pytest.raises(ValueError, match=message):
        PacaConfig(**options)


@pytest.mark.parametrize(
    "options",
    [
        {"paca_alpha": 0, "random_seed": None},
        {"paca_alpha": -4, "random_seed": -(2**70)},
        {"alpha_pattern": None, "random_seed": 2**70, "layers_to_transform": [0]},
        {"layers_to_transform": 0, "layers_pattern": "layers"},
    ],
)
def test_values_that_pefts_own_takes(options):
    config = PacaConfig(target_modules=".*q", **options)
    assert {name: getattr(config, name) for name in options} == options
