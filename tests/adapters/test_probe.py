"""What models are asked when their outputs are compared."""

import pytest
import torch
from transformers import T5Config, T5ForConditionalGeneration, Wav2Vec2Config, Wav2Vec2Model

from pacatune.adapters.base import load_base
from pacatune.adapters.probe import output_error, probe_inputs, run_probe
from tests.adapters import kinds
from tools.families import FAMILIES


def test_tokens_and_a_text_for_a_language_model(tiny_model_dir, tiny_tokenizer):
    model = load_base(str(tiny_model_dir), task_type="CAUSAL_LM", dtype="bfloat16")
    random, text = probe_inputs(model, tiny_tokenizer)
    assert random["input_ids"].shape == (2, 32)
    assert tiny_tokenizer.decode(text["input_ids"][0]).endswith("remained to be built.")
    outputs = run_probe(model, [random, text])
    assert [output.dtype for output in outputs] == [torch.float32] * 2
    assert outputs[0].shape == (2, 32, len(tiny_tokenizer))
    (again,) = probe_inputs(model)
    assert torch.equal(again["input_ids"], random["input_ids"])


def build_t5():
    sizes = {"d_model": 16, "d_kv": 4, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    return T5ForConditionalGeneration(T5Config(**sizes, vocab_size=50)).eval()


TOKENS = {"input_ids": (2, 32)}


@pytest.mark.parametrize(
    ("build", "inputs", "shape"),
    [
        (lambda: kinds.build("convnext"), {"pixel_values": (2, 3, 32, 32)}, (2, 4)),
        (build_t5, {**TOKENS, "decoder_input_ids": (2, 32)}, (2, 32, 50)),
        (FAMILIES["CLIP"].build, {**TOKENS, "pixel_values": (2, 3, 16, 16)}, (2, 2)),
        (
            FAMILIES["Whisper"].build,
            {"input_features": (2, 8, 32), "decoder_input_ids": (2, 32)},
            (2, 32, 64),
        ),
    ],
    ids=["pixels", "both sides", "pairs", "sounds"],
)
def test_inputs_of_other_models(build, inputs, shape):
    model = build()
    batches = probe_inputs(model)
    assert [{name: tensor.shape for name, tensor in batch.items()} for batch in batches] == [inputs]
    assert run_probe(model, batches)[0].shape == shape


def test_other_inputs_are_refused():
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "intermediate_size": 16}
    model = Wav2Vec2Model(Wav2Vec2Config(**sizes, num_attention_heads=2))
    with pytest.raises(ValueError, match=r"Wav2Vec2Model takes 'input_values'; .*--no_verify"):
        probe_inputs(model)


def test_errors_are_relative_to_the_largest_output():
    reference = [torch.tensor([1.0, -4.0]), torch.zeros(3)]
    error = output_error(reference, [torch.tensor([1.0, -4.0]), torch.tensor([0.0, 0.5, -1])])
    assert (error.max_absolute, error.max_relative) == (1.0, 0.25)
