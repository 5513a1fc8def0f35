"""R7: an exported adapter computes the same as LoRA, in any server of LoRA."""

import json
import re
import shutil
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from pacatune.adapters.export import export_lora, lora_config
from pacatune.adapters.folder import read_adapter
from pacatune.adapters.merge import merge
from tests.adapters.fixtures import edit_json, error_in_peft, logits_of, save_adapter, scale
from tests.conftest import build_model
from tests.releases import needs

# PEFT asks transformers in an old way.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")


@pytest.fixture
def export(tiny_model_dir, tmp_path):
    """Save an adapter and export it; return the model, what the export says, and its files."""

    def run(base=tiny_model_dir, keep_extra=False, **options):
        adapted = save_adapter(base, tmp_path / "adapter", **options)
        result = export_lora(None, tmp_path / "adapter", tmp_path / "lora", keep_extra=keep_extra)
        return adapted, result, *files_of(tmp_path / "lora")

    return run


def files_of(folder):
    config = json.loads((folder / "adapter_config.json").read_text())
    return config, load_file(folder / "adapter_model.safetensors")


def assert_same_in_peft(model_dir, lora_dir, adapted, atol=1e-6):
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    lora = PeftModel.from_pretrained(model, lora_dir)
    assert torch.allclose(logits_of(lora), logits_of(adapted), atol=atol)


def test_the_lora_adapter_computes_the_same(export, tiny_model_dir, tmp_path):
    """With a selector and delta as its factors, and a configuration that any PEFT knows."""
    adapted, result, config, tensors = export()
    assert (result.num_modules, result.rounding, result.notes) == (6, 0, [])
    names = ["adapter_config.json", "adapter_model.safetensors"]
    assert sorted(path.name for path in (tmp_path / "lora").iterdir()) == names
    assert_same_in_peft(tiny_model_dir, tmp_path / "lora", adapted)
    modules = read_adapter(tmp_path / "adapter").modules
    assert len(tensors) == 2 * len(modules)
    for name, (delta, indices, _) in modules.items():
        factor_a = tensors[f"base_model.model.{name}.lora_A.weight"]
        assert torch.equal(factor_a.nonzero()[:, 1], indices)
        assert factor_a.sum() == len(indices)
        assert torch.equal(tensors[f"base_model.model.{name}.lora_B.weight"], delta)
    LoraConfig(**config)
    assert config["target_modules"] == ["down_proj", "q_proj", "v_proj"]
    assert (config["r"], config["lora_alpha"], config["bias"]) == (4, 8, "none")
    assert config["base_model_name_or_path"] == str(tiny_model_dir)
    assert not any("paca" in key for key in config)


def test_another_base_of_the_same_shapes_is_refused(adapter_dir, tiny_model_dir, tmp_path):
    """By its files, of which only a few rows of the adapted weights are read."""
    other, output = tmp_path / "other", tmp_path / "out"
    build_model(300, seed=5).save_pretrained(other)
    with pytest.raises(ValueError, match="weights of 6 of 6 adapted modules are not those it was"):
        export_lora(str(other), adapter_dir, output)
    assert not output.exists()
    notes = export_lora(str(other), adapter_dir, output, allow_other_base=True).notes
    assert notes[0].startswith("the weights of 6 of 6 adapted modules are not")
    merge(str(tiny_model_dir), adapter_dir, tmp_path / "merged")
    with pytest.raises(ValueError, match="it is merged into this base already"):
        export_lora(str(tmp_path / "merged"), adapter_dir, tmp_path / "again")


def test_a_base_whose_weights_are_not_here_is_said(adapter_dir, tiny_model_dir, tmp_path):
    bare = tmp_path / tiny_model_dir.name
    bare.mkdir()
    shutil.copy(tiny_model_dir / "config.json", bare)
    (note,) = export_lora(str(bare), adapter_dir, tmp_path / "out").notes
    assert note.startswith("6 of 6 adapted modules could not be compared by weight")


@pytest.mark.parametrize(
    "options",
    [
        {"paca_alpha": 0, "random_seed": None, "alpha_pattern": {"q_proj": 3}},
        {"paca_alpha": -6, "random_seed": -1},
        {"alpha_pattern": {"q_proj": 0, "v_proj": -2.5}},
    ],
)
def test_any_scale_is_exported_and_merged(export, tiny_model_dir, tmp_path, options):
    """PEFT's own PaCA takes them; servers know alphas above 0."""
    adapted, _, config, _ = export(**options)
    assert config["lora_alpha"] > 0
    assert_same_in_peft(tiny_model_dir, tmp_path / "lora", adapted)
    merge(None, tmp_path / "adapter", tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    assert torch.allclose(logits_of(merged), logits_of(adapted), atol=1e-6)


def test_targets_are_exact_where_one_name_ends_another(adapter_dir):
    adapter = read_adapter(adapter_dir)
    adapter = replace(adapter, modules={"q": next(iter(adapter.modules.values()))})
    base = nn.ModuleDict({"q": nn.Linear(2, 2), "deep": nn.ModuleDict({"q": nn.Linear(2, 2)})})
    targets = lora_config(adapter, base, "base")["target_modules"]
    assert isinstance(targets, str)
    assert re.fullmatch(targets, "q")
    assert not re.fullmatch(targets, "deep.q")


PADDED = "4 modules of lower rank are filled up with zeros to 6."
SCALED = "{} modules with another alpha / rank than {} have the difference in B."


@pytest.mark.parametrize(
    ("options", "alpha", "notes"),
    [
        (
            {"rank_pattern": {"down_proj": 6}, "alpha_pattern": {"v_proj": 3}},
            8,
            [PADDED, SCALED.format(4, "8 / 6")],
        ),
        ({"rank_pattern": {"down_proj": 6}, "alpha_pattern": {"down_proj": 12}}, 12, [PADDED]),
        ({"paca_alpha": 2.5}, 4, [SCALED.format(6, "4 / 4")]),
    ],
    ids=["ranks and alphas", "ranks", "a broken alpha"],
)
def test_servers_get_one_rank_and_one_whole_alpha(
    export, tiny_model_dir, tmp_path, options, alpha, notes
):
    adapted, result, config, tensors = export(**options)
    assert result.notes == notes
    assert (result.rounding == 0) == (notes == [PADDED])
    assert (config["rank_pattern"], config["alpha_pattern"]) == ({}, {})
    assert type(config["lora_alpha"]) is int
    assert config["lora_alpha"] == alpha
    for name, tensor in tensors.items():
        assert tensor.shape[0 if "lora_A" in name else 1] == config["r"], name
    assert_same_in_peft(tiny_model_dir, tmp_path / "lora", adapted)


@needs("bitsandbytes")
def test_a_quantised_base_is_exported(export, tmp_path):
    build_model(64, hidden_size=64).save_pretrained(tmp_path / "plain")
    nf4 = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
    )
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", quantization_config=nf4)
    base.save_pretrained(tmp_path / "base")
    _, result, _, tensors = export(tmp_path / "base")
    assert result.num_modules == 6
    assert error_in_peft(tmp_path / "base", tmp_path / "adapter", tmp_path / "lora") <= 1e-5
    assert all(key.endswith((".lora_A.weight", ".lora_B.weight")) for key in tensors)


@needs("bitsandbytes")
@pytest.mark.parametrize("columns_from", ["dequantized", "original"])
def test_an_adapter_of_a_base_quantised_on_loading_is_the_same_on_it(
    export, columns_from, tmp_path
):
    build_model(64, hidden_size=64).save_pretrained(tmp_path / "base")
    nf4 = {"method": "bitsandbytes", "type": "nf4", "block_size": 64, "double": True}
    options = {"quantization": nf4, "columns_from": columns_from}
    _, result, _, _ = export(tmp_path / "base", **options)
    folders = tmp_path / "base", tmp_path / "adapter", tmp_path / "lora"
    assert error_in_peft(*folders, quantization=nf4) <= 1e-5
    compared, note = result.notes
    assert "could not be compared by weight" in compared  # in 4 bits they are other numbers
    assert "quantised as 'bitsandbytes nf4, block_size 64, double'" in note
    assert ("and on no other" in note) == (columns_from == "original")


@pytest.mark.parametrize(("dtype", "most"), [("bfloat16", 2**-8), ("float16", 2**-11)])
def test_fewer_bits_round_b_alone_and_say_so(adapter_dir, tmp_path, dtype, most):
    result = export_lora(None, adapter_dir, tmp_path / "lora", dtype=dtype)
    assert 0 < result.rounding <= most
    _, tensors = files_of(tmp_path / "lora")
    assert {tensor.dtype for tensor in tensors.values()} == {getattr(torch, dtype)}


@pytest.mark.parametrize(
    "extra",
    [
        {"modules_to_save": ["lm_head"]},
        {"trainable_token_indices": [3, 5]},
        {"bias": "all"},
        {"bias": "paca_only"},
    ],
)
def test_what_lora_servers_do_not_load_is_refused_or_kept(export, tmp_path, extra):
    build_model(300, attention_bias=True).save_pretrained(tmp_path / "base")
    adapted, *_ = export(tmp_path / "base", keep_extra=True, **extra)
    assert_same_in_peft(tmp_path / "base", tmp_path / "lora", adapted)
    with pytest.raises(ValueError, match=r"tensors that are not PaCA's, first .*--keep_extra"):
        export_lora(None, tmp_path / "adapter", tmp_path / "other")


def test_what_cannot_be_exported(adapter_copy, model_copy, lora_dir, tmp_path):
    """Shapes come from the configuration alone."""
    (model_copy / "model.safetensors").unlink()
    assert export_lora(str(model_copy), adapter_copy, tmp_path / "other").num_modules == 6
    edit_json(model_copy / "config.json", intermediate_size=8)
    with pytest.raises(ValueError, match=r"columns up to \d+, but the base .* has 8 columns"):
        export_lora(str(model_copy), adapter_copy, tmp_path / "lora")
    scale(adapter_copy, 10**6)
    with pytest.raises(ValueError, match=r"too big for torch\.float16; export in float32"):
        export_lora(None, adapter_copy, tmp_path / "lora", dtype="float16")
    with pytest.raises(ValueError, match=r"is no PaCA adapter; only .* already needs no export"):
        export_lora(None, lora_dir, tmp_path / "lora")
    assert not (tmp_path / "lora").exists()
    with pytest.raises(FileExistsError, match="is not empty"):
        export_lora(None, adapter_copy, adapter_copy)
