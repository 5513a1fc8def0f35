import json
import shutil

import pytest
import torch
from peft import get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from pacatune import PacaConfig
from pacatune.training import LoraSection, PacaSection
from pacatune.training import language as models
from pacatune.training.sft import check_packing, packs
from pacatune.training.task import Plan, count_trainable, make_adapter_config, task_of

SIZES = {
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


@pytest.fixture
def model_copy(tiny_model_dir, tmp_path):
    return shutil.copytree(tiny_model_dir, tmp_path / "model")


def edit(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize("path", ["./no/such", "/no", "~/no-such-model", "a/b/c"])
def test_missing_model_folder(make_config, path):
    with pytest.raises(FileNotFoundError, match=f"model folder {path} does not exist; check"):
        models.load_tokenizer(make_config(model={"path": path}))


def test_folder_without_a_model(make_config, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"holds no config.json; `model.path` must be"):
        models.load_tokenizer(make_config(model={"path": str(tmp_path)}))


def test_chat_template_as_text_and_as_file(make_config, tmp_path):
    text = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    assert models.load_tokenizer(make_config(data={"chat_template": text})).chat_template == text
    (tmp_path / "t.jinja").write_text(text)
    config = make_config(data={"chat_template": str(tmp_path / "t.jinja")})
    assert models.load_tokenizer(config).chat_template == text


def test_missing_chat_template(make_config):
    with pytest.raises(FileNotFoundError, match=r"`data.chat_template` \('t.jinja'\) is neither"):
        models.load_tokenizer(make_config(data={"chat_template": "t.jinja"}))


def test_stop_token(make_config):
    config = make_config(training={"eos_token": "<|user|>"})
    tokenizer = models.load_tokenizer(config)
    assert tokenizer.eos_token == "<|user|>"
    assert models.find_stop_ids(config, tokenizer) == {2, tokenizer.eos_token_id}
    with pytest.raises(ValueError, match=r"`training.eos_token` \('<no>'\) is not in the vocab"):
        models.load_tokenizer(make_config(training={"eos_token": "<no>"}))


def test_stop_ids_are_those_of_generation(make_config, model_copy):
    config = make_config(model={"path": str(model_copy)})
    tokenizer = models.load_tokenizer(config)
    edit(model_copy / "generation_config.json", eos_token_id=[2, 5])
    assert models.find_stop_ids(config, tokenizer) == {2, 5}
    (model_copy / "generation_config.json").unlink()
    assert models.find_stop_ids(config, tokenizer) == {2}


def test_code_of_a_model_is_never_executed(make_config, model_copy, tmp_path):
    (model_copy / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    edit(
        model_copy / "config.json",
        model_type="evil",
        auto_map={"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"},
    )
    config = make_config(model={"path": str(model_copy)})
    with pytest.raises(ValueError, match="comes with code of its own, which is never executed"):
        plan(config)
    assert not (tmp_path / "ran").exists()


def test_pickled_weights_are_not_loaded(make_config, model_copy):
    torch.save({}, model_copy / "pytorch_model.bin")
    (model_copy / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"cannot be read .*no file named model.safetensors"):
        task_of(make_config(model={"path": str(model_copy)})).load_model()


def packed_and_apart(model, level=None):
    """Loss and gradients of three examples, padded and packed."""
    from pacatune import lean

    adapted = get_peft_model(model, PacaConfig(r=4, target_modules="all-linear"))
    if level is not None:
        lean.enable(adapted, "require", level=level)
    rows = [{"input_ids": [3 + i * n % 90 for i in range(n)]} for n in (5, 11, 7)]
    rows = [{**row, "labels": row["input_ids"]} for row in rows]
    results = []
    for padding_free in (False, True):
        adapted.zero_grad()
        batch = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=padding_free)(rows)
        loss = adapted(**batch, use_cache=False).loss
        loss.backward()
        trained = (p for p in adapted.parameters() if p.requires_grad)
        results.append((loss.detach(), *(p.grad.clone() for p in trained)))
    return results


@pytest.mark.parametrize(
    ("attention", "kind", "level"),
    [("sdpa", "llama", 1), ("sdpa", "llama", 3), ("eager", "llama", None), ("sdpa", "gpt2", None)],
)
def test_packed_examples_give_the_gradients_of_padded_ones(attention, kind, level):
    sizes = {**SIZES, "n_layer": 2, "n_head": 4, "n_embd": 32} if kind == "gpt2" else SIZES
    config = AutoConfig.for_model(kind, **sizes, bos_token_id=1, eos_token_id=2)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention).double().eval()
    check_packing(model)
    apart, packed = packed_and_apart(model, level)
    for one, two in zip(apart, packed, strict=True):
        # The loss is computed in float32.
        torch.testing.assert_close(one, two, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("kind", ["mamba", "bloom"])
def test_models_in_which_packed_examples_see_each_other(kind):
    """Through states, and through attention that looks at no position."""
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SIZES))
    with pytest.raises(
        ValueError, match=rf"packed examples see each other in {type(model).__name__}"
    ):
        check_packing(model)
    assert model.training


def test_flash_attention_and_plain_rows_are_not_tried(make_config):
    for training in ({"packing": True}, {"padding_free": True}, {"eval_packing": True}):
        assert packs(make_config(training=training).training, None)
        for attention in ("flash_attention_2", "kernels-community/flash-attn3"):
            assert not packs(make_config(training=training).training, attention)
    assert not packs(make_config().training, None)


def test_packing_of_sharded_weights(make_config, monkeypatch):
    with pytest.raises(ValueError, match=r"\('wrapped'\) lets examples attend to each other"):
        task_of(make_config(training={"packing": True, "packing_strategy": "wrapped"})).prepare()
    monkeypatch.setattr("pacatune.training.sft.is_deepspeed_zero3_enabled", lambda: True)
    with pytest.raises(
        ValueError, match=r"or its weights are sharded \(ZeRO-3\), so that it cannot"
    ):
        check_packing(task_of(make_config()).load_model())


def plan(config):
    return task_of(config).plan()


@pytest.mark.parametrize("method", ["paca", "lora", "dora", "moslora", "full"])
def test_plan_is_what_is_trained(make_config, method):
    config = make_config(method)
    planned, adapter_config, max_positions = task_of(config).plan_training()
    model = task_of(config).load_model()
    if adapter_config is not None:
        assert adapter_config.target_modules == {
            *("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
        }
        model = get_peft_model(model, adapter_config)
    assert planned.num_trainable_parameters == count_trainable(model)
    assert max_positions == 256
    assert len(planned.targets) == (0 if method == "full" else 14)


def test_plan_of_other_targets(make_config):
    section = PacaSection(target_modules=["q_proj", "down_proj"], layers_to_transform=[1])
    planned = plan(make_config(paca=section))
    assert planned.targets == {
        "model.layers.1.self_attn.q_proj": "32 -> 32",
        "model.layers.1.mlp.down_proj": "64 -> 32",
    }
    assert planned.summary() == ["1 x q_proj (32 -> 32)", "1 x down_proj (64 -> 32)"]


@pytest.mark.parametrize("method", ["paca", "lora"])
def test_layers_beside_a_regular_expression_are_refused(make_config, method):
    section = {"target_modules": r".*\.q_proj", "layers_to_transform": [1]}
    sections = (
        {"paca": PacaSection(**section)} if method == "paca" else {"lora": LoraSection(**section)}
    )
    with pytest.raises(ValueError, match=r"`layers_to_transform`.* cannot be used when"):
        plan(make_config(method, **sections))


def test_layers_of_many_sizes_are_one_line_of_the_plan():
    targets = {"0.conv_pw": "8 -> 16", "1.conv_pw": "16 -> 32", "0.fc": "8 -> 8", "1.fc": "8 -> 8"}
    planned = Plan(targets, 1, 2)
    assert planned.summary() == ["2 x conv_pw", "2 x fc (8 -> 8)"]


def test_sections_reach_peft(make_config):
    paca = make_adapter_config(
        make_config(paca=PacaSection(r=4, paca_alpha=8, random_seed=7, rank_pattern={"q_proj": 2}))
    )
    assert (paca.r, paca.paca_alpha, paca.random_seed) == (4, 8, 7)
    assert paca.rank_pattern == {"q_proj": 2}
    dora = make_adapter_config(make_config("dora", lora=LoraSection(r=4, lora_dropout=0.5)))
    assert dora.use_dora
    assert (dora.r, dora.lora_dropout) == (4, 0.5)
    assert make_adapter_config(make_config("full")) is None


def test_model_arguments_are_passed_on(make_config):
    config = make_config(training={"model_init_kwargs": {"no_such_argument": 1}})
    with pytest.raises(TypeError, match="no_such_argument"):
        task_of(config).load_model()


def test_weights_are_loaded_in_the_chosen_type(make_config):
    config = make_config(model={"dtype": "bfloat16"})
    assert models.weights_dtype(config) == torch.bfloat16
    assert task_of(config).load_model().dtype == torch.bfloat16
