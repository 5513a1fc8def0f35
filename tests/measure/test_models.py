"""The model that is simulated: its configuration, and its modules without weights."""

import pytest
import torch

from pacatune.measure.models import load_config, make_skeleton
from pacatune.measure.presets import PRESETS
from tests.measure.real_step import LLAMA, write_config

PUBLISHED = {
    "llama2-7b": 6_738_415_616,
    "llama2-13b": 13_015_864_320,
    "llama3-8b": 8_030_261_248,
    "llama3.1-70b": 70_553_706_496,
    "llama3.2-1b": 1_235_814_400,
    "llama3.2-3b": 3_212_749_824,
    "qwen3-8b": 8_190_735_360,
    "gemma3-12b": 11_766_034_176,
    "mistral-7b": 7_248_023_552,
}
"""Parameters of the language models, a tied head counted once."""


@pytest.mark.parametrize("name", PRESETS)
def test_presets_have_as_many_parameters_as_published(name):
    config = load_config(name)
    model = make_skeleton(config, name, torch.bfloat16)
    assert model.num_parameters() == PUBLISHED[name]
    assert {(p.device.type, p.dtype) for p in model.parameters()} == {("meta", torch.bfloat16)}
    if name == "gemma3-12b":
        assert config.layer_types.count("full_attention") == 8
        assert config.sliding_window == 1024


def test_remote_code_is_never_executed(tmp_path):
    """The module beside the configuration would leave a file."""
    (tmp_path / "modeling.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    maps = {"AutoConfig": "modeling.Config", "AutoModelForCausalLM": "modeling.Model"}
    path = write_config(tmp_path, {"model_type": "own", "auto_map": maps})
    with pytest.raises(ValueError, match="code of its own, which is never executed"):
        load_config(path)
    write_config(tmp_path, LLAMA | {"auto_map": maps})
    make_skeleton(load_config(str(tmp_path)), "own", torch.float32)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "llamo"}, "model type `llamo` but Transformers does not recognize"),
        ({"quantization_config": {"quant_method": "awq"}}, "is saved quantised; give the config"),
        ({"num_hidden_layers": "8"}, "refuses its config.json: (?s:.*)'num_hidden_layers' expect"),
        ({"model_type": "vit"}, "model it: 'vit' is no causal language model"),
    ],
)
def test_values_that_cannot_be_are_refused(changes, message, tmp_path):
    path = write_config(tmp_path, LLAMA, **changes)
    with pytest.raises(ValueError, match=message):
        make_skeleton(load_config(path), "it", torch.float32)


def test_a_misspelt_preset():
    with pytest.raises(ValueError, match="unknown model 'llma3-8b'; did you mean 'llama3-8b'"):
        load_config("llma3-8b")
