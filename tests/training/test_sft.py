import pytest
import torch
from peft import get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from pacatune import PacaConfig, lean
from pacatune.training.language import find_stop_ids, load_tokenizer, weights_dtype
from pacatune.training.sft import check_packing, packs
from pacatune.training.task import count_trainable, make_adapter_config, task_of
from tests.adapters.fixtures import edit_json, model_copy

__all__ = ["model_copy"]

SIZES = {
    **{"vocab_size": 99, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64},
}
GPT2 = {"n_layer": 2, "n_head": 4, "n_embd": 32}


def test_stop_ids_are_those_of_generation_and_of_the_run(make_config, model_copy):
    config = make_config(model={"path": str(model_copy)})
    tokenizer = load_tokenizer(config)
    edit_json(model_copy / "generation_config.json", eos_token_id=[2, 5])
    assert find_stop_ids(config, tokenizer) == {2, 5}
    (model_copy / "generation_config.json").unlink()
    assert find_stop_ids(config, tokenizer) == {2}
    config = make_config(training={"eos_token": "<|user|>"})
    tokenizer = load_tokenizer(config)
    assert tokenizer.eos_token == "<|user|>"
    assert find_stop_ids(config, tokenizer) == {2, tokenizer.eos_token_id}


def test_nothing_of_a_model_is_executed(make_config, model_copy, tmp_path):
    """Neither its code nor pickled weights."""
    model = {"path": str(model_copy)}
    torch.save({}, model_copy / "pytorch_model.bin")
    (model_copy / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"cannot be read .*no file named model.safetensors"):
        task_of(make_config(model=model)).load_model()
    (model_copy / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    code = {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"}
    edit_json(model_copy / "config.json", model_type="evil", auto_map=code)
    with pytest.raises(ValueError, match="comes with code of its own, which is never executed"):
        task_of(make_config(model=model)).plan()
    assert not (tmp_path / "ran").exists()


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


def test_packing_that_is_not_tried(make_config, monkeypatch):
    """With flash attention, plain rows, or weights that are sharded."""
    for option in ("packing", "padding_free", "eval_packing"):
        training = make_config(training={option: True}).training
        assert packs(training, None)
        assert not packs(training, "kernels-community/flash-attn3")
    assert not packs(make_config().training, None)
    monkeypatch.setattr("pacatune.training.sft.is_deepspeed_zero3_enabled", lambda: True)
    message = r"or its weights are sharded \(ZeRO-3\), so that it cannot"
    with pytest.raises(ValueError, match=message):
        check_packing(task_of(make_config()).load_model())


@pytest.mark.parametrize("method", ["paca", "dora", "moslora", "full"])
def test_plan_is_what_is_trained(make_config, method):
    config = make_config(method)
    planned, adapter_config, max_positions = task_of(config).plan_training()
    model = task_of(config).load_model()
    if adapter_config is not None:
        model = get_peft_model(model, adapter_config)
    assert planned.num_trainable_parameters == count_trainable(model)
    assert max_positions == 256
    assert len(planned.targets) == (0 if method == "full" else 14)


def test_options_reach_peft_and_transformers(make_config):
    section = {"r": 4, "paca_alpha": 8, "random_seed": 7, "rank_pattern": {"q_proj": 2}}
    paca = make_adapter_config(make_config(paca=section))
    assert {name: getattr(paca, name) for name in section} == section
    dora = make_adapter_config(make_config("dora", lora={"r": 4, "lora_dropout": 0.5}))
    assert (dora.use_dora, dora.r, dora.lora_dropout) == (True, 4, 0.5)
    moslora = make_adapter_config(make_config("moslora", moslora={"mixer_init": "orthogonal"}))
    assert moslora.mixer_init == "orthogonal"
    assert make_adapter_config(make_config("full")) is None
    config = make_config(model={"dtype": "bfloat16"})
    assert weights_dtype(config) == task_of(config).load_model().dtype == torch.bfloat16
    config = make_config(training={"model_init_kwargs": {"no_such_argument": 1}})
    with pytest.raises(TypeError, match="no_such_argument"):
        task_of(config).load_model()
