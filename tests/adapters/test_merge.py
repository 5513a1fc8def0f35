"""R7: a merged model has the trained bits; one that has others is never written."""

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from pacatune.adapters.merge import merge
from pacatune.tuner import PacaLayer
from tests.adapters.fixtures import edit_json, logits_of, save_adapter, scale
from tests.conftest import build_model

THETA = {"rope_type": "default", "rope_theta": 999.0}
ROPE = {"rope_parameters": THETA, **THETA}  # transformers 5, and 4


def test_the_merged_folder_needs_nothing_of_ours(tiny_model_dir, adapter_dir, tmp_path):
    result = merge(str(tiny_model_dir), adapter_dir, tmp_path / "out")
    assert (result.dtype, result.num_modules, result.notes) == ("float32", 6, [])
    assert result.is_verified
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {path.name for path in tiny_model_dir.iterdir()}


def test_what_can_be_asked_for(tiny_model_dir, adapter_dir, tmp_path):
    """The adapter names the base; the tokenizer comes along."""
    result = merge(None, adapter_dir, tmp_path / "out", dtype="bfloat16", verify=False)
    assert (result.base, result.dtype) == (str(tiny_model_dir), "bfloat16")
    assert not result.is_verified
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert merged.dtype == torch.bfloat16
    ours, base = (AutoTokenizer.from_pretrained(f) for f in (tmp_path / "out", tiny_model_dir))
    assert ours.get_vocab() == base.get_vocab()
    assert ours.chat_template == base.chat_template


@pytest.mark.filterwarnings("ignore:.*save_embedding_layers:UserWarning")
@pytest.mark.parametrize("is_adapted", [True, False])
def test_tied_heads_are_untied_where_they_are_adapted(tmp_path, is_adapted):
    base = build_model(300, tie_word_embeddings=True)
    base.save_pretrained(tmp_path / "tied")
    targets = ["lm_head", "q_proj"] if is_adapted else ["q_proj"]
    adapted = save_adapter(tmp_path / "tied", tmp_path / "adapter", target_modules=targets)
    merge(None, tmp_path / "adapter", tmp_path / "out")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert merged.config.tie_word_embeddings != is_adapted
    assert (merged.lm_head.weight is merged.model.embed_tokens.weight) != is_adapted
    names = load_file(tmp_path / "out" / "model.safetensors").keys()
    assert ("lm_head.weight" in names) == is_adapted
    assert torch.equal(merged.model.embed_tokens.weight, base.model.embed_tokens.weight)
    assert torch.equal(merged.lm_head.weight, base.lm_head.weight) != is_adapted
    assert torch.allclose(logits_of(merged), logits_of(adapted), atol=1e-5)


@pytest.mark.parametrize(
    ("config", "changed"),
    [
        ({"modules_to_save": ["lm_head"]}, "lm_head.weight"),
        ({"trainable_token_indices": [3, 5]}, "model.embed_tokens.weight"),
        ({"bias": "paca_only"}, "model.layers.0.self_attn.q_proj.bias"),
    ],
)
def test_what_else_was_trained_is_merged_too(tmp_path, config, changed):
    build_model(300, attention_bias=True).save_pretrained(tmp_path / "base")
    adapted = save_adapter(tmp_path / "base", tmp_path / "adapter", **config)
    merge(None, tmp_path / "adapter", tmp_path / "out")
    before, after = (
        load_file(tmp_path / name / "model.safetensors")[changed] for name in ("base", "out")
    )
    assert not torch.equal(before, after)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.allclose(logits_of(merged), logits_of(adapted), atol=1e-5)


# What rounding takes.


@pytest.mark.parametrize("factor", [1, 1e-4])
def test_rounding_is_measured_and_noted_where_it_takes_half(tiny_model_dir, tmp_path, factor):
    base = tmp_path / "base"
    AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.bfloat16).save_pretrained(base)
    save_adapter(base, tmp_path / "adapter", dtype="bfloat16")
    scale(tmp_path / "adapter", factor)
    result = merge(None, tmp_path / "adapter", tmp_path / "out")
    before, after, adapter = (
        load_file(path)
        for path in (
            *(folder / "model.safetensors" for folder in (base, tmp_path / "out")),
            tmp_path / "adapter" / "adapter_model.safetensors",
        )
    )
    lost = changed = 0.0
    for name in (name for name in adapter if name.endswith("paca_delta")):
        module, change = name.removesuffix(".paca_delta"), 2 * adapter[name]
        columns, weight = adapter[f"{module}.paca_indices"], module.split(".", 2)[2] + ".weight"
        written, start = (model[weight][:, columns].float() for model in (after, before))
        lost += float((written - start - change).square().sum())
        changed += float(change.square().sum())
    assert result.rounding == pytest.approx((lost / changed) ** 0.5, rel=1e-3)
    taken = f"rounding to bfloat16 takes {result.rounding:.0%} of what the adapter changes; --dty"
    assert any(taken in note for note in result.notes) == (factor < 1) == (result.rounding > 0.5)
    exact = merge(None, tmp_path / "adapter", tmp_path / "exact", dtype="float32")
    assert exact.rounding < 1e-3
    assert exact.notes == []


def test_an_untrained_adapter_is_noted(adapter_copy, tmp_path):
    scale(adapter_copy, 0)
    result = merge(None, adapter_copy, tmp_path / "out")
    assert result.rounding == 0
    assert "the adapter changes no column: it may be untrained." in result.notes


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_lora_adapter_is_merged_by_peft(lora_dir, tmp_path, dtype):
    result = merge(None, lora_dir, tmp_path / "out", dtype=dtype)
    assert (result.rounding, result.num_modules) == (None, 6)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="float32")
    base = AutoModelForCausalLM.from_pretrained(result.base, dtype="float32")
    plain = logits_of(base)
    expected = logits_of(PeftModel.from_pretrained(base, lora_dir))
    error, effect = ((expected - other).abs().max() for other in (logits_of(merged), plain))
    assert error < effect * (1e-4 if dtype == "float32" else 0.1)


# What is refused, and nothing written.


def test_a_folder_in_use_and_a_quantised_base_are_refused(model_copy, adapter_dir, tmp_path):
    with pytest.raises(FileExistsError, match="is not empty"):  # said before a base is loaded
        merge("never looked at", adapter_dir, model_copy)
    few_bits = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    edit_json(model_copy / "config.json", quantization_config=few_bits)
    with pytest.raises(ValueError, match=r"is saved quantised; .* Give the original base"):
        merge(str(model_copy), adapter_dir, tmp_path / "out")


def test_a_merge_that_forgets_a_column_is_refused(adapter_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(PacaLayer, "merge", lambda self, *args, **kwargs: None)
    message = r"module 'model\..*: the merged columns are not W \+ scaling \* delta in torch"
    with pytest.raises(ValueError, match=message):
        merge(None, adapter_dir, tmp_path / "out", verify=False)
    assert not list(tmp_path.iterdir())


def flip_a_bit(place):
    def change(folder):
        with (folder / "model.safetensors").open("r+b") as file:
            file.seek(*place)
            byte = file.read(1)[0]
            file.seek(-1, 1)
            file.write(bytes([byte ^ 1]))

    return change


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (flip_a_bit((-1, 2)), r"1 tensors .*'model\.norm\.weight'"),
        (flip_a_bit((-5000, 2)), r"1 tensors of the written model, first 'model\."),
        (lambda folder: build_model(300).save_pretrained(folder), r"\d+ tensors of the written"),
        (lambda f: edit_json(f / "config.json", **ROPE), r"\d tensors .*inv_freq'"),
    ],
    ids=["the last bit", "a bit of a column", "another model", "another rotary base"],
)
def test_what_differs_from_memory_never_gets_its_name(
    adapter_dir, tmp_path, monkeypatch, change, name
):
    """Also where only a bit is another that no output of a few tokens would show."""
    save = LlamaForCausalLM.save_pretrained

    def save_and_change(self, folder):
        monkeypatch.undo()
        save(self, folder)
        change(folder)

    monkeypatch.setattr(LlamaForCausalLM, "save_pretrained", save_and_change)
    with pytest.raises(ValueError, match=rf"{name}.* are not the merged ones bit for bit; nothing"):
        merge(None, adapter_dir, tmp_path / "out")
    assert not list(tmp_path.iterdir())
