"""Models with random and quantised weights."""

import pytest
import torch
from torch import nn

from benchmarks.models import llama_values, make_batch, make_model

CPU = torch.device("cpu")
VALUES = llama_values(32, 2, num_heads=2, intermediate_size=48, vocab_size=64)


@pytest.mark.parametrize(
    ("hidden_size", "heads", "mlp"), [(4096, 32, 11008), (512, 8, 1408), (32, 1, 128)]
)
def test_proportions_are_llamas(hidden_size, heads, mlp):
    values = llama_values(hidden_size, 2)
    assert values["num_attention_heads"] == values["num_key_value_heads"] == heads
    assert values["intermediate_size"] == mlp
    assert values["vocab_size"] == min(8 * hidden_size, 32000)


def test_weights_are_drawn_by_the_seed_and_embeddings_ask_for_a_gradient():
    model, twin, other = (make_model(VALUES, torch.bfloat16, CPU, seed=n) for n in (0, 0, 1))
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert torch.equal(model.lm_head.weight, twin.lm_head.weight)
    assert not torch.equal(model.lm_head.weight, other.lm_head.weight)
    model.requires_grad_(False)
    assert model(input_ids=make_batch(2, 7, VALUES["vocab_size"], seed=0)).logits.requires_grad


def test_weights_are_quantised():
    model = make_model(VALUES, torch.float32, CPU, seed=0, quantization="nf4")
    layers = [m for m in model.modules() if type(m).__name__ == "Linear4bit"]
    assert len(layers) == 14
    assert {layer.weight.dtype for layer in layers} == {torch.uint8}
    assert all(layer.weight.quant_state.state2 is not None for layer in layers)
    assert type(model.lm_head) is nn.Linear
