import json
import math
from functools import partial

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForCausalLM,
)

from pacatune import PacaConfig
from pacatune.adapters.export import export_lora
from pacatune.adapters.loading import answered_warnings
from pacatune.adapters.merge import merge, rounding_limit
from pacatune.adapters.probe import OutputError, check_outputs, probe_inputs, run_probe
from tests.adapters.fixtures import save_adapter
from tests.forks import run_python
from tools.families import FAMILIES

TOKENS = torch.arange(24).view(2, 12)
TEXTS = {"whose": "the merged model's", "dtype": "bfloat16", "fix": "Use more bits."}


@pytest.fixture
def tied_dir(tmp_path, tiny_tokenizer):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=len(tiny_tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "tied")
    return tmp_path / "tied"


def test_the_merged_folder_needs_nothing_of_ours(tiny_model_dir, tmp_path):
    adapted = save_adapter(tiny_model_dir, tmp_path / "adapter")
    result = merge(str(tiny_model_dir), tmp_path / "adapter", tmp_path / "out")
    assert (result.dtype, result.num_modules, result.notes) == ("float32", 6, [])
    assert result.error.max_relative <= 1e-6
    assert result.effect > 0.01
    with torch.no_grad():
        torch.save(adapted(TOKENS).logits, tmp_path / "expected.pt")
    script = f"""
import sys, torch
sys.modules.update(pacatune=None, peft=None)
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained({str(tmp_path / "out")!r}).eval()
AutoTokenizer.from_pretrained({str(tmp_path / "out")!r})
expected = torch.load({str(tmp_path / "expected.pt")!r})
with torch.no_grad():
    logits = model(torch.arange(24).view(2, 12)).logits
assert torch.allclose(logits, expected, atol=1e-6)
"""
    done = run_python(script)
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "out" / "adapter_config.json").exists()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_only_adapted_columns_change_and_are_rounded_once(tiny_model_dir, tmp_path, dtype):
    torch_dtype = getattr(torch, dtype)
    AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch_dtype).save_pretrained(
        tmp_path / "base"
    )
    save_adapter(tmp_path / "base", tmp_path / "adapter", dtype=dtype)
    result = merge(str(tmp_path / "base"), tmp_path / "adapter", tmp_path / "out")
    assert result.dtype == dtype
    before = load_file(tmp_path / "base" / "model.safetensors")
    after = load_file(tmp_path / "out" / "model.safetensors")
    adapter = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert before.keys() == after.keys()
    for name, weight in before.items():
        key = "base_model.model." + name.removesuffix(".weight")
        expected = weight.clone()
        if f"{key}.paca_delta" in adapter:
            indices = adapter[f"{key}.paca_indices"]
            columns = weight[:, indices].float() + 2 * adapter[f"{key}.paca_delta"]
            expected[:, indices] = columns.to(torch_dtype)
        assert after[name].dtype == torch_dtype
        assert torch.equal(after[name], expected), name


def test_another_dtype_can_be_asked_for(tiny_model_dir, adapter_dir, tmp_path):
    result = merge(str(tiny_model_dir), adapter_dir, tmp_path / "out", dtype="bfloat16")
    assert result.dtype == "bfloat16"
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert merged.dtype == torch.bfloat16


def test_the_base_the_adapter_names_is_the_default(tiny_model_dir, adapter_dir, tmp_path):
    assert merge(None, adapter_dir, tmp_path / "out").base == str(tiny_model_dir)


def test_a_tied_head_is_untied_by_the_merge(tied_dir, tmp_path):
    with pytest.warns(UserWarning, match=r"save_embedding_layers"):
        adapted = save_adapter(tied_dir, tmp_path / "adapter", target_modules=["lm_head", "q_proj"])
    result = merge(str(tied_dir), tmp_path / "adapter", tmp_path / "out")
    assert result.error.max_relative < 1e-5
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    base = AutoModelForCausalLM.from_pretrained(tied_dir)
    assert merged.config.tie_word_embeddings is False
    assert torch.equal(merged.model.embed_tokens.weight, base.model.embed_tokens.weight)
    assert not torch.equal(merged.lm_head.weight, base.lm_head.weight)
    with torch.no_grad():
        assert torch.allclose(merged(TOKENS).logits, adapted(TOKENS).logits, atol=1e-5)


def test_tied_embeddings_that_are_not_adapted_stay_tied(tied_dir, tmp_path):
    save_adapter(tied_dir, tmp_path / "adapter")
    merge(str(tied_dir), tmp_path / "adapter", tmp_path / "out")
    assert "lm_head.weight" not in load_file(tmp_path / "out" / "model.safetensors")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert merged.lm_head.weight is merged.model.embed_tokens.weight


def test_weights_stored_the_other_way_round(tmp_path):
    config = GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=50, n_positions=64)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "base")
    adapted = save_adapter(tmp_path / "base", tmp_path / "adapter", target_modules=["c_attn"])
    result = merge(str(tmp_path / "base"), tmp_path / "adapter", tmp_path / "out")
    assert result.error.max_relative < 1e-5
    assert result.effect > 1e-3
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        assert torch.allclose(merged(TOKENS).logits, adapted(TOKENS).logits, atol=1e-5)


@pytest.mark.parametrize(
    ("config", "changed"),
    [
        ({"modules_to_save": ["lm_head"]}, "lm_head.weight"),
        ({"trainable_token_indices": [3, 5]}, "model.embed_tokens.weight"),
    ],
)
def test_what_else_was_trained_is_merged_too(tiny_model_dir, tmp_path, config, changed):
    adapted = save_adapter(tiny_model_dir, tmp_path / "adapter", **config)
    merge(str(tiny_model_dir), tmp_path / "adapter", tmp_path / "out")
    before = load_file(tiny_model_dir / "model.safetensors")
    after = load_file(tmp_path / "out" / "model.safetensors")
    assert not torch.equal(before[changed], after[changed])
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        assert torch.allclose(merged(TOKENS).logits, adapted(TOKENS).logits, atol=1e-5)


def test_trained_biases_are_merged_too(tmp_path):
    config = GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=50, n_positions=64)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "base")
    save_adapter(
        tmp_path / "base", tmp_path / "adapter", target_modules=["c_attn"], bias="paca_only"
    )
    merge(str(tmp_path / "base"), tmp_path / "adapter", tmp_path / "out")
    before = load_file(tmp_path / "base" / "model.safetensors")
    after = load_file(tmp_path / "out" / "model.safetensors")
    name = "transformer.h.0.attn.c_attn.bias"
    assert not torch.equal(before[name], after[name])


def test_a_lora_adapter_is_merged_by_peft(tiny_model_dir, lora_dir, tmp_path):
    result = merge(str(tiny_model_dir), lora_dir, tmp_path / "out")
    assert result.num_modules == 6
    assert result.error.max_relative < 1e-5
    assert result.effect > 0.01
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    with answered_warnings(), torch.no_grad():
        expected = PeftModel.from_pretrained(model, lora_dir)(TOKENS).logits
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
        assert torch.allclose(merged(TOKENS).logits, expected, atol=1e-5)


def test_the_tokenizer_comes_along(tiny_model_dir, adapter_dir, tmp_path):
    merge(str(tiny_model_dir), adapter_dir, tmp_path / "out")
    merged, base = (AutoTokenizer.from_pretrained(f) for f in (tmp_path / "out", tiny_model_dir))
    assert merged.get_vocab() == base.get_vocab()
    assert merged.chat_template == base.chat_template


def test_without_verifying_nothing_is_measured(tiny_model_dir, adapter_dir, tmp_path):
    result = merge(str(tiny_model_dir), adapter_dir, tmp_path / "out", verify=False)
    assert (result.error, result.effect) == (None, None)
    assert (tmp_path / "out" / "model.safetensors").exists()


def test_an_untrained_adapter_is_noted(tiny_model_dir, tmp_path):
    base = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    with answered_warnings():
        get_peft_model(
            base, PacaConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")
        ).save_pretrained(tmp_path / "adapter")
    result = merge(str(tiny_model_dir), tmp_path / "adapter", tmp_path / "out")
    assert result.effect == 0
    assert any("may be untrained" in note for note in result.notes)


@pytest.mark.parametrize(
    ("error", "effect", "message"),
    [
        (4.1, 9.0, r"rounding to bfloat16 explains 4\.0e\+00 at most; nothing was"),
        (math.nan, 9.0, "the merged model's outputs differ .* by nan .* explains"),
        (1.4, 2.0, r"bfloat16, more than half .* \(2\.0e\+00\); nothing was written\. Use more"),
    ],
)
def test_differences_beyond_the_limit_are_refused(error, effect, message):
    found = OutputError(max_absolute=error, max_relative=error)
    with pytest.raises(ValueError, match=message):
        check_outputs(found, 4.0, effect, **TEXTS)


@pytest.mark.parametrize(("error", "effect", "kept"), [(2, 9, 4), (2, 5, 2.5), (2, 0, 4)])
def test_the_limit_is_rounding_and_half_of_the_effect(error, effect, kept):
    found = OutputError(max_absolute=error, max_relative=error)
    assert check_outputs(found, 4.0, effect, **TEXTS) == kept


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_outputs_that_rounding_leaves_alone_have_a_limit_too(dtype):
    """Few outputs (one score a probe) may all stay by chance; here the bias alone says them."""
    model = FAMILIES["BERT"].build().to(dtype).eval()
    for parameter in model.parameters():
        parameter.data.fill_(0.0 if parameter.ndim > 1 else 0.5)
    inputs = probe_inputs(model)
    limit = rounding_limit(model, inputs, run_probe(model, inputs))
    assert limit == 4 * torch.finfo(dtype).eps * 0.5


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_lora_export_is_merged_within_the_rounding_of_its_dtype(tiny_model_dir, tmp_path, dtype):
    save_adapter(tiny_model_dir, tmp_path / "adapter")
    export_lora(None, tmp_path / "adapter", tmp_path / "lora")
    result = merge(str(tiny_model_dir), tmp_path / "lora", tmp_path / "out", dtype=dtype)
    assert 0 < result.error.max_absolute <= result.limit
    # The limit is one of the dtype, not a fixed part of the outputs.
    size = result.error.max_absolute / result.error.max_relative
    eps = torch.finfo(getattr(torch, dtype)).eps
    assert eps / 4 < result.limit / size < 16 * eps
    assert result.limit < result.effect / 2


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_lora_merge_that_does_nothing_is_refused(
    tiny_model_dir, lora_dir, tmp_path, monkeypatch, dtype
):
    from peft.tuners.lora import Linear

    monkeypatch.setattr(Linear, "merge", lambda self, *args, **kwargs: None)
    with pytest.raises(ValueError, match="outputs differ from the adapter's by"):
        merge(str(tiny_model_dir), lora_dir, tmp_path / "out", dtype=dtype)
    assert not (tmp_path / "out").exists()


def test_an_adapter_that_the_dtype_rounds_away_is_refused(tiny_model_dir, tmp_path):
    save_adapter(tiny_model_dir, tmp_path / "adapter")
    export_lora(None, tmp_path / "adapter", tmp_path / "lora")
    path = tmp_path / "lora" / "adapter_model.safetensors"
    tensors = load_file(path)
    save_file({k: v * 1e-3 if "lora_B" in k else v for k, v in tensors.items()}, path)
    merged = partial(merge, str(tiny_model_dir), tmp_path / "lora", tmp_path / "out")
    with pytest.raises(ValueError, match=r"to bfloat16, more than half .* --dtype float32,"):
        merged(dtype="bfloat16")
    assert not list(tmp_path.glob("*out*"))
    assert merged(dtype="float32").error.max_absolute > 0


def test_a_folder_in_use_is_refused_before_the_base_is_loaded(adapter_dir, tmp_path):
    (tmp_path / "mine").touch()
    with pytest.raises(FileExistsError, match="is not empty"):
        merge("never looked at", adapter_dir, tmp_path)


def test_a_quantised_base_is_refused(model_copy, adapter_dir, tmp_path):
    path = model_copy / "config.json"
    quantised = {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}
    path.write_text(json.dumps(json.loads(path.read_text()) | quantised))
    with pytest.raises(ValueError, match=r"is saved quantised; .* Give the original base"):
        merge(str(model_copy), adapter_dir, tmp_path / "out")


def test_another_base_is_refused_and_nothing_written(model_copy, adapter_dir, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(model_copy)
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.weight.add_(0.01)
    model.save_pretrained(model_copy)
    with pytest.raises(ValueError, match=r"weights of 1 of 6 adapted modules .*--allow-other-base"):
        merge(str(model_copy), adapter_dir, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    result = merge(str(model_copy), adapter_dir, tmp_path / "out", allow_other_base=True)
    assert "weights of 1 of 6" in result.notes[0]


def test_a_merge_that_changes_outputs_is_refused(
    tiny_model_dir, adapter_dir, tmp_path, monkeypatch
):
    from pacatune.tuner import PacaLayer

    original = PacaLayer.merge

    def merge_and_damage(self, *args, **kwargs):
        original(self, *args, **kwargs)
        indices = self.paca_indices["default"]
        others = [i for i in range(self.in_features) if i not in indices]
        self.base_layer.weight.data[:, others] *= 1.5

    monkeypatch.setattr(PacaLayer, "merge", merge_and_damage)
    with pytest.raises(ValueError, match=r"outputs differ from the adapter's by .* of"):
        merge(str(tiny_model_dir), adapter_dir, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_merge_that_forgets_a_column_is_refused(
    tiny_model_dir, adapter_dir, tmp_path, monkeypatch
):
    from pacatune.tuner import PacaLayer

    monkeypatch.setattr(PacaLayer, "merge", lambda self, *args, **kwargs: None)
    message = (
        r"module 'model\.layers\..*: the merged columns are not W \+ scaling \* delta in torch"
    )
    with pytest.raises(ValueError, match=message):
        merge(str(tiny_model_dir), adapter_dir, tmp_path / "out", verify=False)
    assert not (tmp_path / "out").exists()


def test_a_file_written_wrong_never_gets_its_name(
    tiny_model_dir, adapter_dir, tmp_path, monkeypatch
):
    def write_base_instead(self, folder):
        monkeypatch.undo()
        AutoModelForCausalLM.from_pretrained(tiny_model_dir).save_pretrained(folder)

    monkeypatch.setattr(LlamaForCausalLM, "save_pretrained", write_base_instead)
    with pytest.raises(ValueError, match=r"outputs differ from the adapter's by .* of their"):
        merge(str(tiny_model_dir), adapter_dir, tmp_path / "out")
    assert not list(tmp_path.iterdir())
