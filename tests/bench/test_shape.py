"""Sizes of the measured model."""

import json

import pytest

from pacatune.bench import shape
from pacatune.bench.shape import llama_values, load_values, parse_shape


def test_shapes_are_two_numbers():
    assert parse_shape("512x8") == (512, 8)
    for text in ("512", "512x0", "-512x8", "512x8x2", "axb", "512 x 8", ""):
        with pytest.raises(ValueError, match=r"`shape` \(.*\) must be HIDDENxLAYERS, two whole"):
            parse_shape(text)


@pytest.mark.parametrize(
    ("hidden_size", "heads", "mlp"), [(4096, 32, 11008), (512, 8, 1408), (32, 1, 128)]
)
def test_proportions_are_llamas(hidden_size, heads, mlp):
    values = llama_values(hidden_size, 2)
    assert values["num_attention_heads"] == values["num_key_value_heads"] == heads
    assert values["intermediate_size"] == mlp
    assert values["vocab_size"] == min(8 * hidden_size, 32000)


def test_given_sizes_are_taken():
    values = llama_values(
        4096, 32, num_heads=32, num_kv_heads=8, intermediate_size=14336, vocab_size=128256
    )
    assert values["num_key_value_heads"] == 8
    assert (values["intermediate_size"], values["vocab_size"]) == (14336, 128256)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"num_heads": 7}, r"`num_heads` \(7\) must divide `hidden_size` \(64\) into an even"),
        ({"num_heads": 64}, r"`num_heads` \(64\) must divide .* even number of channels"),
        ({"num_heads": 4, "num_kv_heads": 3}, r"`num_kv_heads` \(3\) must divide `num_heads`"),
        ({"vocab_size": -1}, r"`vocab_size` \(-1\) must be at least 1"),
        ({"intermediate_size": 0}, r"`intermediate_size` \(0\) must be at least 1"),
        ({"hidden_size": 60}, r"`hidden_size` \(60\) does not divide into heads of 64, 32"),
    ],
)
def test_sizes_that_cannot_be_are_refused(sizes, message):
    with pytest.raises(ValueError, match=message):
        llama_values(**{"hidden_size": 64, "num_layers": 1, **sizes})


def test_a_config_is_read_and_nothing_else(tiny_model_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(shape, "_PRESETS", "pacatune.no_such_module")
    (tmp_path / "config.json").write_bytes((tiny_model_dir / "config.json").read_bytes())
    for path in (tmp_path, tmp_path / "config.json"):
        assert load_values(str(path))["hidden_size"] == 32


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ("{", "is not valid JSON"),
        ({"model_type": "mine", "auto_map": {}}, r"`model_type` \('mine'\) is unknown to trans"),
        ([1], r"`model_type` \(None\) is unknown"),
        ({"model_type": "llama", "quantization_config": {}}, "is saved quantised; give the orig"),
    ],
)
def test_other_configs_are_refused(tmp_path, monkeypatch, values, message):
    monkeypatch.setattr(shape, "_PRESETS", "pacatune.no_such_module")
    text = values if isinstance(values, str) else json.dumps(values)
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        load_values(str(tmp_path))


def test_missing_models_say_what_works(tmp_path, monkeypatch):
    monkeypatch.setattr(shape, "_PRESETS", "pacatune.no_such_module")
    with pytest.raises(FileNotFoundError, match=r"there is no config.json; give a model folder"):
        load_values(str(tmp_path / "nothing"))


def test_presets_come_from_the_estimator(monkeypatch):
    class Config:
        def to_dict(self):
            return {"model_type": "llama"}

    class Presets:
        load_config = staticmethod(lambda name: Config())

    monkeypatch.setattr(shape.importlib, "import_module", lambda name: Presets)
    assert load_values("llama3-8b") == {"model_type": "llama"}
