"""The measured model: as transformers makes it, and quantised without ever being whole."""

import pytest
import torch
from torch import nn

from pacatune.bench.model import make_batch, make_model

CPU = torch.device("cpu")


def test_a_model_is_filled_as_transformers_does(values):
    from transformers import LlamaConfig, LlamaForCausalLM

    model = make_model(values, torch.float32, CPU, seed=0)
    twin = LlamaForCausalLM(LlamaConfig(**values)).eval()
    for (name, ours), (_, theirs) in zip(
        model.named_parameters(), twin.named_parameters(), strict=True
    ):
        assert ours.shape == theirs.shape
        if name.endswith("norm.weight"):
            assert torch.equal(ours, theirs)
        else:
            assert ours.std().item() == pytest.approx(theirs.std().item(), rel=0.2)
    twin.load_state_dict(model.state_dict())
    batch = make_batch(2, 7, values["vocab_size"], seed=0)
    # Rotary frequencies are in no state dict.
    assert torch.equal(model.eval()(input_ids=batch).logits, twin(input_ids=batch).logits)


def test_a_tied_head_is_the_embedding(values):
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
    for layer in layers:
        assert layer.weight.dtype == torch.uint8
        assert layer.weight.quant_state.state2 is not None
    assert type(model.lm_head) is nn.Linear


def test_other_architectures_are_measured_too():
    from transformers import Qwen3Config

    values = Qwen3Config(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        vocab_size=64,
    ).to_dict()
    batch = make_batch(1, 5, 64, seed=0)
    loss = make_model(values, torch.float32, CPU, seed=0)(input_ids=batch, labels=batch).loss
    assert loss.item() == pytest.approx(torch.log(torch.tensor(64.0)).item(), abs=0.5)


def test_what_is_no_language_model_is_refused():
    from transformers import ViTConfig

    with pytest.raises(ValueError, match="'vit' is no causal language model"):
        make_model(ViTConfig().to_dict(), torch.float32, CPU, seed=0)


def test_batches_come_from_a_seed():
    batch = make_batch(3, 4, 10, seed=1)
    assert batch.shape == (3, 4)
    assert torch.equal(batch, make_batch(3, 4, 10, seed=1))
    assert not torch.equal(batch, make_batch(3, 4, 10, seed=2))
