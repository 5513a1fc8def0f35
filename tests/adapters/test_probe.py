import pytest
import torch
from transformers import (
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
    Wav2Vec2Config,
    Wav2Vec2Model,
)

from pacatune.adapters.base import load_base
from pacatune.adapters.probe import output_error, probe_inputs, run_probe
from tools.families import FAMILIES


def test_tokens_and_a_text_for_a_language_model(tiny_model_dir, tiny_tokenizer):
    model = load_base(str(tiny_model_dir), task_type="CAUSAL_LM", dtype="bfloat16")
    random, text = probe_inputs(model, tiny_tokenizer)
    assert random["input_ids"].shape == (2, 32)
    assert tiny_tokenizer.decode(text["input_ids"][0]).endswith("remained to be built.")
    outputs = run_probe(model, [random, text])
    assert [output.dtype for output in outputs] == [torch.float32] * 2
    assert outputs[0].shape == (2, 32, len(tiny_tokenizer))
    again = probe_inputs(model)
    assert len(again) == 1
    assert torch.equal(again[0]["input_ids"], random["input_ids"])


def test_pixels_for_an_image_model():
    config = ViTConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        image_size=8,
        patch_size=4,
    )
    model = ViTForImageClassification(config).eval()
    inputs = probe_inputs(model)
    assert inputs[0]["pixel_values"].shape == (2, 3, 8, 8)
    assert run_probe(model, inputs)[0].shape == (2, 2)


def test_both_sides_for_an_encoder_and_decoder():
    config = T5Config(d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2, vocab_size=50)
    model = T5ForConditionalGeneration(config).eval()
    assert run_probe(model, probe_inputs(model))[0].shape == (2, 32, 50)


@pytest.mark.parametrize(
    ("family", "inputs", "shape"),
    [
        ("CLIP", {"input_ids": (2, 32), "pixel_values": (2, 3, 16, 16)}, (2, 2)),
        ("Whisper", {"input_features": (2, 8, 32), "decoder_input_ids": (2, 32)}, (2, 32, 64)),
    ],
)
def test_pairs_and_sounds(family, inputs, shape):
    model = FAMILIES[family].build()
    batches = probe_inputs(model)
    assert [{name: tensor.shape for name, tensor in batch.items()} for batch in batches] == [inputs]
    assert run_probe(model, batches)[0].shape == shape


def test_other_inputs_are_refused():
    config = Wav2Vec2Config(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    with pytest.raises(ValueError, match=r"Wav2Vec2Model takes 'input_values'; .*--no-verify"):
        probe_inputs(Wav2Vec2Model(config))


def test_errors_are_relative_to_the_largest_output():
    reference = [torch.tensor([1.0, -4.0]), torch.zeros(3)]
    error = output_error(reference, [torch.tensor([1.0, -4.0]), torch.tensor([0.0, 0.5, -1])])
    assert (error.max_absolute, error.max_relative) == (1.0, 0.25)
