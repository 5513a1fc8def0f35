"""The model that is measured or simulated: configurations, shapes, random and quantised weights."""

import pytest
import torch
from torch import nn

from pacatune.measure.models import (
    llama_values,
    load_config,
    make_batch,
    make_model,
    make_skeleton,
    parse_shape,
)
from pacatune.measure.presets import PRESETS
from tests.measure.real_step import LLAMA, write_config

CPU = torch.device("cpu")


def test_shapes_are_two_numbers():
    assert parse_shape("512x8") == (512, 8)
    for text in ("512x0", "-512x8", "512x8x2", "512 x 8"):
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


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"num_heads": 7}, r"`num_heads` \(7\) must divide `hidden_size` \(64\) into an even"),
        ({"num_heads": 4, "num_kv_heads": 3}, r"`num_kv_heads` \(3\) must divide `num_heads`"),
        ({"vocab_size": -1}, r"`vocab_size` \(-1\) must be a whole number of at least 1"),
    ],
)
def test_sizes_that_cannot_be_are_refused(sizes, message):
    with pytest.raises(ValueError, match=message):
        llama_values(**{"hidden_size": 64, "num_layers": 1, **sizes})


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
    for name in (str(tmp_path), path):
        with pytest.raises(ValueError, match="code of its own, which is never executed"):
            load_config(name)
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


def test_a_model_is_filled_as_transformers_does(values):
    from transformers import LlamaConfig, LlamaForCausalLM

    model = make_model(values, torch.float32, CPU, seed=0)
    twin = LlamaForCausalLM(LlamaConfig(**values)).eval()
    theirs = dict(twin.named_parameters())
    for name, ours in model.named_parameters():
        assert ours.shape == theirs[name].shape
        if name.endswith("norm.weight"):
            assert torch.equal(ours, theirs[name])
        else:
            assert ours.std().item() == pytest.approx(theirs[name].std().item(), rel=0.2)
    twin.load_state_dict(model.state_dict())
    batch = make_batch(2, 7, values["vocab_size"], seed=0)
    # Rotary frequencies are in no state dict.
    assert torch.equal(model.eval()(input_ids=batch).logits, twin(input_ids=batch).logits)
    model = make_model(values | {"tie_word_embeddings": True}, torch.bfloat16, CPU, seed=0)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_weights_are_quantised_layer_by_layer(values, monkeypatch):
    sizes, empty = [], torch.empty

    def watch(*shape, **options):
        tensor = empty(*shape, **options)
        sizes.append(tensor.numel() if tensor.device.type == "cpu" else 0)
        return tensor

    monkeypatch.setattr(torch, "empty", watch)
    model = make_model(values, torch.float32, CPU, seed=0, quantization="nf4")
    layers = [m for m in model.modules() if type(m).__name__ == "Linear4bit"]
    assert len(layers) == 14
    assert max(sizes) <= max(p.numel() for p in nn.ModuleList(layers).parameters()) * 2
    assert {layer.weight.dtype for layer in layers} == {torch.uint8}
    assert all(layer.weight.quant_state.state2 is not None for layer in layers)
    assert type(model.lm_head) is nn.Linear
