import pytest
import torch
from peft import get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from pacatune import PacaConfig, lean
from pacatune.training.language import Task
from pacatune.training.sft import check_packing, packs

SIZES = {
    **{"vocab_size": 99, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64},
}
GPT2 = {"n_layer": 2, "n_head": 4, "n_embd": 32}


@pytest.mark.parametrize(
    ("attention", "kind", "level"),
    [("sdpa", "llama", 1), ("sdpa", "llama", 3), ("eager", "llama", None), ("sdpa", "gpt2", None)],
)
def test_packed_examples_give_the_gradients_of_padded_ones(attention, kind, level):
    sizes = SIZES | (GPT2 if kind == "gpt2" else {})
    config = AutoConfig.for_model(kind, **sizes, bos_token_id=1, eos_token_id=2)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention).double().eval()
    check_packing(model)
    model = get_peft_model(model, PacaConfig(r=4, target_modules="all-linear"))
    if level is not None:
        lean.enable(model, "require", level=level)
    rows = [{"input_ids": [3 + i * n % 90 for i in range(n)]} for n in (5, 11, 7)]
    rows = [{**row, "labels": row["input_ids"]} for row in rows]
    results = []
    for padding_free in (False, True):
        model.zero_grad()
        batch = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=padding_free)(rows)
        loss = model(**batch, use_cache=False).loss
        loss.backward()
        trained = (p for p in model.parameters() if p.requires_grad)
        results.append((loss.detach(), *(p.grad.clone() for p in trained)))
    # The loss is computed in float32.
    torch.testing.assert_close(*results, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("kind", ["mamba", "bloom"])
def test_models_in_which_packed_examples_see_each_other(kind):
    """Through states, and through attention that looks at no position."""
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SIZES))
    message = f"packed examples see each other in {type(model).__name__}"
    with pytest.raises(ValueError, match=message):
        check_packing(model)
    assert model.training


def flash_model(kind, **options):
    """A model that would use flash attention, which no CPU has."""
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SIZES, **options))
    model.config._attn_implementation = "kernels-community/flash-attn3"
    return model


JAMBA = {"attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 1}
JAMBA["use_mamba_kernels"] = False
FALCON = {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8}


@pytest.mark.parametrize(("kind", "options"), [("llama", {}), ("gemma2", {"head_dim": 8})])
def test_flash_attention_is_trusted_in_layers_of_attention(make_config, kind, options):
    for option in ("packing", "padding_free", "eval_packing"):
        training = make_config(training={option: True}).training
        model = flash_model(kind, **options)
        assert not packs(training, model)
        model.config._attn_implementation = "sdpa"
        assert packs(training, model)
    assert not packs(make_config().training, model)


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("jamba", JAMBA, "packed examples see each other in JambaForCausalLM"),
        ("falcon_h1", FALCON, "FalconH1ForCausalLM cannot be tried|see each other in FalconH1"),
        ("lfm2", {"layer_types": ["conv", "full_attention"]}, "Lfm2ForCausalLM cannot be tried"),
    ],
)
def test_flash_attention_is_not_trusted_beside_other_layers(make_config, kind, options, message):
    """States and convolutions go on from one example to the next, whatever the attention."""
    model, training = flash_model(kind, **options), make_config(training={"packing": True}).training
    assert packs(training, model)
    with pytest.raises(ValueError, match=message):
        check_packing(model)
    assert "flash" in model.config._attn_implementation
    if kind == "lfm2":
        model.config.layer_types = None  # other versions of transformers may say none
        assert packs(training, model)


def test_packing_that_cannot_be_tried(make_config, monkeypatch):
    monkeypatch.setattr("pacatune.training.sft.is_deepspeed_zero3_enabled", lambda: True)
    message = r"its weights are sharded \(ZeRO-3\), so that it cannot"
    with pytest.raises(ValueError, match=message):
        check_packing(Task(make_config()).load_model())
