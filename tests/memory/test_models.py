"""Configurations: those that ship, those that are given, and those that are refused."""

import json

import pytest
import torch

from pacatune.memory.models import load_config, make_model
from pacatune.memory.presets import PRESETS
from tests.memory.real_step import LLAMA, write_config


@pytest.mark.parametrize("name", PRESETS)
def test_presets_have_as_many_parameters_as_published(name):
    model = make_model(load_config(name), name, torch.bfloat16)
    assert model.num_parameters() == PRESETS[name].num_parameters
    assert {p.device.type for p in model.parameters()} == {"meta"}
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_preset_of_gemma_has_windows():
    config = load_config("gemma3-12b")
    assert config.layer_types.count("full_attention") == 8
    assert config.sliding_window == 1024


def test_file_and_folder_are_the_same(tmp_path):
    path = write_config(tmp_path, LLAMA)
    assert load_config(path).to_dict() == load_config(str(tmp_path)).to_dict()
    assert load_config(path).hidden_size == 64


def test_unknown_name_suggests_the_nearest():
    with pytest.raises(ValueError, match="unknown model 'llma3-8b'; did you mean 'llama3-8b'"):
        load_config("llma3-8b")


@pytest.mark.parametrize("name", ["./nowhere", "/no/where", "config.json", "a/b/c"])
def test_missing_path(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"does not exist; give a config.json or a model"):
        load_config(name)


def test_folder_without_config(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"holds no config.json; give a model folder"):
        load_config(str(tmp_path))


def test_hub_id_that_cannot_be_had():
    with pytest.raises(FileNotFoundError, match=r"'some/model'\) is neither a file or folder here"):
        load_config("some/model")


@pytest.mark.parametrize(("text", "message"), [("{", "is not valid JSON"), ("[]", "holds a list")])
def test_file_that_is_no_configuration(text, message, tmp_path):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        load_config(str(tmp_path))


def test_file_that_is_too_large(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"a": "x" * 2**22}))
    with pytest.raises(ValueError, match=r"a config.json has at most 4194304"):
        load_config(str(tmp_path))


def test_remote_code_is_never_executed(tmp_path):
    """The module beside the configuration would leave a file."""
    (tmp_path / "modeling.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    maps = {"AutoConfig": "modeling.Config", "AutoModelForCausalLM": "modeling.Model"}
    write_config(tmp_path, {"model_type": "own", "auto_map": maps})
    with pytest.raises(ValueError, match="code of its own, which is never executed"):
        load_config(str(tmp_path))
    write_config(tmp_path, LLAMA | {"auto_map": maps})
    make_model(load_config(str(tmp_path)), "own", torch.float32)
    assert not (tmp_path / "ran").exists()


def test_unknown_model_type(tmp_path):
    path = write_config(tmp_path, LLAMA, model_type="llamo")
    with pytest.raises(ValueError, match=r"`model_type` \('llamo'\) is unknown .*'llama'\?"):
        load_config(path)


def test_quantised_checkpoint(tmp_path):
    path = write_config(tmp_path, LLAMA, quantization_config={"quant_method": "awq"})
    with pytest.raises(ValueError, match="is saved quantised; give the configuration of the orig"):
        load_config(path)


def test_model_that_is_no_language_model(tmp_path):
    config = load_config(write_config(tmp_path, {"model_type": "vit"}))
    with pytest.raises(ValueError, match="model it: 'vit' is no causal language model"):
        make_model(config, "it", torch.float32)


@pytest.mark.parametrize("name", ["hidden_size", "num_hidden_layers", "vocab_size"])
@pytest.mark.parametrize("value", [0, -1, 1.5, "8", True])
def test_sizes_must_be_whole_and_positive(name, value, tmp_path):
    path = write_config(tmp_path, LLAMA, **{name: value})
    with pytest.raises(ValueError, match=f"`{name}` .* must be a whole number of at least 1"):
        load_config(path)


def test_heads_must_divide(tmp_path):
    path = write_config(tmp_path, LLAMA, num_attention_heads=5)
    with pytest.raises(ValueError, match=r"`hidden_size` \(64\) must be a multiple of .*\(5\)"):
        load_config(path)
    path = write_config(tmp_path, LLAMA, num_key_value_heads=3)
    with pytest.raises(ValueError, match=r"`num_attention_heads` \(4\) must be a multiple"):
        load_config(path)
    path = write_config(tmp_path, LLAMA, head_dim=15)
    with pytest.raises(ValueError, match=r"`head_dim` \(15\) must be even"):
        load_config(path)


def test_sizes_of_the_language_model_within_a_larger_one(tmp_path):
    values = {"model_type": "gemma3", "text_config": LLAMA | {"num_hidden_layers": 0}}
    with pytest.raises(ValueError, match="`num_hidden_layers` \\(0\\) must be"):
        load_config(write_config(tmp_path, values))


def test_value_that_transformers_refuses(tmp_path):
    path = write_config(tmp_path, LLAMA, rms_norm_eps="small")
    with pytest.raises(ValueError, match=r"transformers refuses its config.json: "):
        load_config(path)


def test_value_that_the_model_refuses(tmp_path):
    config = load_config(write_config(tmp_path, LLAMA, hidden_act="sillu"))
    with pytest.raises(ValueError, match=r"model it: transformers cannot build it \(.*sillu"):
        make_model(config, "it", torch.float32)
