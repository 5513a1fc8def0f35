"""R7: a merged model computes what was trained; one that does not is never written."""

import math
from functools import partial

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from pacatune.adapters.export import export_lora
from pacatune.adapters.merge import merge, rounding_limit
from pacatune.adapters.probe import OutputError, check_outputs, probe_inputs, run_probe
from pacatune.tuner import PacaLayer
from tests.adapters.fixtures import edit_json, logits_of, save_adapter, scale
from tests.conftest import build_model
from tests.forks import run_python
from tools.families import FAMILIES

WITHOUT_US = """
import sys, torch
sys.modules.update(pacatune=None, peft=None)
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, expected = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(folder).eval()
AutoTokenizer.from_pretrained(folder)
with torch.no_grad():
    logits = model(torch.arange(24).view(2, 12)).logits
assert torch.allclose(logits, torch.load(expected), atol=1e-6)
"""


def test_the_merged_folder_needs_nothing_of_ours(tiny_model_dir, tmp_path):
    adapted = save_adapter(tiny_model_dir, tmp_path / "adapter")
    result = merge(str(tiny_model_dir), tmp_path / "adapter", tmp_path / "out")
    assert (result.dtype, result.num_modules, result.notes) == ("float32", 6, [])
    assert result.error.max_relative <= 1e-6
    assert result.effect > 0.01
    torch.save(logits_of(adapted), tmp_path / "expected.pt")
    done = run_python(WITHOUT_US, tmp_path / "out", tmp_path / "expected.pt")
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "out" / "adapter_config.json").exists()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_only_adapted_columns_change_and_are_rounded_once(tiny_model_dir, tmp_path, dtype):
    torch_dtype, base = getattr(torch, dtype), tmp_path / "base"
    AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch_dtype).save_pretrained(base)
    save_adapter(base, tmp_path / "adapter", dtype=dtype)
    assert merge(str(base), tmp_path / "adapter", tmp_path / "out").dtype == dtype
    before, after = (load_file(folder / "model.safetensors") for folder in (base, tmp_path / "out"))
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


def test_what_can_be_asked_for(tiny_model_dir, adapter_dir, tmp_path):
    """The adapter names the base; the tokenizer comes along."""
    result = merge(None, adapter_dir, tmp_path / "out", dtype="bfloat16", verify=False)
    assert (result.base, result.dtype) == (str(tiny_model_dir), "bfloat16")
    assert (result.error, result.effect) == (None, None)
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
    result = merge(None, tmp_path / "adapter", tmp_path / "out")
    assert result.error.max_relative < 1e-5
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


def test_an_untrained_adapter_is_noted(adapter_copy, tmp_path):
    scale(adapter_copy, 0)
    result = merge(None, adapter_copy, tmp_path / "out")
    assert result.effect == 0
    assert any("may be untrained" in note for note in result.notes)


# How far outputs may be apart.

TEXTS = {"whose": "the merged model's", "dtype": "bfloat16", "fix": "Use more bits."}


@pytest.mark.parametrize(
    ("error", "effect", "message"),
    [
        (4.1, 9.0, r"rounding to bfloat16 explains 4\.0e\+00 at most; nothing was"),
        (math.nan, 9.0, r"the merged model's outputs differ .* by nan .* explains"),
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


@pytest.fixture
def exported(adapter_dir, tmp_path):
    """A LoRA, which PEFT merges with other roundings than ours."""
    export_lora(None, adapter_dir, tmp_path / "lora")
    return tmp_path / "lora"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_lora_export_is_merged_within_the_rounding_of_its_dtype(exported, tmp_path, dtype):
    result = merge(None, exported, tmp_path / "out", dtype=dtype)
    assert 0 < result.error.max_absolute <= result.limit
    # The limit is one of the dtype, not a fixed part of the outputs.
    size = result.error.max_absolute / result.error.max_relative
    eps = torch.finfo(getattr(torch, dtype)).eps
    assert eps / 4 < result.limit / size < 16 * eps
    assert result.limit < result.effect / 2


def test_an_adapter_that_the_dtype_rounds_away_is_refused(exported, tmp_path):
    scale(exported, 1e-3, "lora_B")
    merged = partial(merge, None, exported, tmp_path / "out")
    with pytest.raises(ValueError, match=r"to bfloat16, more than half .* --dtype float32,"):
        merged(dtype="bfloat16")
    assert not list(tmp_path.glob("*out*"))
    assert merged(dtype="float32").error.max_absolute > 0


# What is refused, and nothing written.


def test_a_folder_in_use_and_a_quantised_base_are_refused(model_copy, adapter_dir, tmp_path):
    with pytest.raises(FileExistsError, match="is not empty"):  # said before a base is loaded
        merge("never looked at", adapter_dir, model_copy)
    few_bits = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    edit_json(model_copy / "config.json", quantization_config=few_bits)
    with pytest.raises(ValueError, match=r"is saved quantised; .* Give the original base"):
        merge(str(model_copy), adapter_dir, tmp_path / "out")


def test_another_base_is_refused(model, model_copy, adapter_dir, tmp_path):
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.weight.add_(0.01)
    model.save_pretrained(model_copy)
    with pytest.raises(ValueError, match=r"weights of 1 of 6 adapted modules .*--allow_other_base"):
        merge(str(model_copy), adapter_dir, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    result = merge(str(model_copy), adapter_dir, tmp_path / "out", allow_other_base=True)
    assert "weights of 1 of 6" in result.notes[0]


def test_a_merge_that_forgets_a_column_is_refused(adapter_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(PacaLayer, "merge", lambda self, *args, **kwargs: None)
    message = r"module 'model\..*: the merged columns are not W \+ scaling \* delta in torch"
    with pytest.raises(ValueError, match=message):
        merge(None, adapter_dir, tmp_path / "out", verify=False)
    assert not (tmp_path / "out").exists()


def test_a_file_written_wrong_never_gets_its_name(model, adapter_dir, tmp_path, monkeypatch):
    def write_base_instead(self, folder):
        monkeypatch.undo()
        model.save_pretrained(folder)

    monkeypatch.setattr(LlamaForCausalLM, "save_pretrained", write_base_instead)
    with pytest.raises(ValueError, match=r"outputs differ from the adapter's by .* of their"):
        merge(None, adapter_dir, tmp_path / "out")
    assert not list(tmp_path.iterdir())
