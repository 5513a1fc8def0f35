import json
import re
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, GPT2Config, GPT2LMHeadModel

from pacatune.adapters import export as export_module
from pacatune.adapters.export import export_limit, export_lora, lora_config
from pacatune.adapters.export_factors import column_selector
from pacatune.adapters.folder import read_adapter
from pacatune.adapters.merge import merge
from pacatune.adapters.probe import OutputError, check_outputs
from tests.adapters.fixtures import save_adapter
from tests.conftest import build_model
from tools.families import FAMILIES

TOKENS = torch.arange(24).view(2, 12)


def lora_logits(model_dir, lora_dir):
    """Logits of the exported adapter in PEFT's own LoRA."""
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    with torch.no_grad():
        return PeftModel.from_pretrained(model, lora_dir).eval()(TOKENS).logits


def paca_logits(model):
    with torch.no_grad():
        return model(TOKENS).logits


pytestmark = pytest.mark.filterwarnings(
    # PEFT asks transformers in an old way.
    "ignore:.*is_gradient_checkpointing:FutureWarning"
)


def test_row_groups_have_a_rank_of_their_distinct_columns(tiny_model_dir, tmp_path):
    options = {"groups": 4, "rank_pattern": {"v_proj": 2}, "alpha_pattern": {"v_proj": 2}}
    adapted = save_adapter(tiny_model_dir, tmp_path / "adapter", **options)
    result = export_lora(str(tiny_model_dir), tmp_path / "adapter", tmp_path / "lora", verify=True)
    modules = read_adapter(tmp_path / "adapter").modules
    rank = max(len(one.indices.unique()) for one in modules.values())
    assert 4 < rank <= 16
    assert result.rounding < 1e-6
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    # The same factor, 8 / 4 for 4 columns of each row.
    assert (config["r"], config["lora_alpha"]) == (rank, 2 * rank)
    assert f"4 row groups of 4 columns: as LoRA the rank is {rank}" in result.notes[0]
    logits = lora_logits(tiny_model_dir, tmp_path / "lora")
    assert torch.allclose(logits, paca_logits(adapted), atol=1e-5)
    tensors = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    for name, (delta, indices) in modules.items():
        a, b = (tensors[f"base_model.model.{name}.lora_{one}.weight"] for one in "AB")
        rows = (b @ a).chunk(4)
        scaling = 1 if "v_proj" in name else 2
        for part, own, columns in zip(rows, delta.chunk(4), indices, strict=True):
            assert int((part != 0).any(0).sum()) == len(columns)
            torch.testing.assert_close(2 * part[:, columns], scaling * own)


def test_a_selector_selects():
    x = torch.randn(5, 7)
    indices = torch.tensor([1, 4, 6])
    assert torch.equal(x @ column_selector(indices, 7).T, x[:, indices])


def test_the_lora_adapter_computes_the_same(tiny_model_dir, tmp_path):
    adapted = save_adapter(tiny_model_dir, tmp_path / "adapter")
    result = export_lora(str(tiny_model_dir), tmp_path / "adapter", tmp_path / "lora")
    assert (result.num_modules, result.rounding, result.error, result.notes) == (6, 0, None, [])
    assert sorted(path.name for path in (tmp_path / "lora").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    logits = lora_logits(tiny_model_dir, tmp_path / "lora")
    assert torch.allclose(logits, paca_logits(adapted), atol=1e-6)


@pytest.mark.parametrize(
    "options",
    [
        {"paca_alpha": 0, "random_seed": None},
        {"paca_alpha": -6, "random_seed": -1},
        {"alpha_pattern": {"q_proj": 0, "v_proj": -2.5}},
        {"paca_alpha": 0, "alpha_pattern": {"q_proj": 3}},
    ],
)
def test_any_scale_is_exported_and_merged(tiny_model_dir, tmp_path, options):
    """PEFT's own PaCA takes them; servers know alphas above 0."""
    adapted = save_adapter(tiny_model_dir, tmp_path / "adapter", **options)
    export_lora(str(tiny_model_dir), tmp_path / "adapter", tmp_path / "lora")
    assert json.loads((tmp_path / "lora" / "adapter_config.json").read_text())["lora_alpha"] > 0
    logits = lora_logits(tiny_model_dir, tmp_path / "lora")
    assert torch.allclose(logits, paca_logits(adapted), atol=1e-6)
    merge(str(tiny_model_dir), tmp_path / "adapter", tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    assert torch.allclose(paca_logits(merged), paca_logits(adapted), atol=1e-6)


def test_only_factors_of_lora_are_in_the_file(tiny_model_dir, adapter_dir, tmp_path):
    export_lora(None, adapter_dir, tmp_path / "lora")
    tensors = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    adapter = read_adapter(adapter_dir)
    assert len(tensors) == 2 * len(adapter.modules)
    for name, (delta, indices) in adapter.modules.items():
        factor_a = tensors[f"base_model.model.{name}.lora_A.weight"]
        assert torch.equal(factor_a.nonzero()[:, 1], indices)
        assert factor_a.sum() == len(indices)
        assert torch.equal(tensors[f"base_model.model.{name}.lora_B.weight"], delta)


def test_the_configuration_is_plain_loras(tiny_model_dir, adapter_dir, tmp_path):
    export_lora(None, adapter_dir, tmp_path / "lora")
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    LoraConfig(**config)
    assert config["target_modules"] == ["down_proj", "q_proj", "v_proj"]
    assert (config["r"], config["lora_alpha"], config["bias"]) == (4, 8, "none")
    assert config["base_model_name_or_path"] == str(tiny_model_dir)
    assert not any("paca" in key for key in config)


def test_targets_are_exact_where_one_name_ends_another(adapter_dir):
    adapter = read_adapter(adapter_dir)
    adapter = replace(adapter, modules={"q": next(iter(adapter.modules.values()))})
    layers = nn.ModuleDict({"q": nn.Linear(2, 2)})
    base = nn.ModuleDict({"q": nn.Linear(2, 2), "deep": layers})
    adapter = type(adapter)(
        **{**vars(adapter), "modules": {"q": next(iter(adapter.modules.values()))}}
    )
    targets = lora_config(adapter, base, "base")["target_modules"]
    assert isinstance(targets, str)
    assert re.fullmatch(targets, "q")
    assert not re.fullmatch(targets, "deep.q")


@pytest.mark.parametrize(
    ("options", "alpha", "notes"),
    [
        (
            {"rank_pattern": {"down_proj": 6}, "alpha_pattern": {"v_proj": 3}},
            8,
            [
                "4 modules of lower rank are filled up with zeros to 6.",
                "4 modules with another alpha / rank than 8 / 6 have the difference in B.",
            ],
        ),
        (
            {"rank_pattern": {"down_proj": 6}, "alpha_pattern": {"down_proj": 12}},
            12,
            ["4 modules of lower rank are filled up with zeros to 6."],
        ),
        (
            {"paca_alpha": 2.5},
            4,
            ["6 modules with another alpha / rank than 4 / 4 have the difference in B."],
        ),
    ],
    ids=["ranks and alphas", "ranks", "a broken alpha"],
)
def test_servers_get_one_rank_and_one_whole_alpha(tiny_model_dir, tmp_path, options, alpha, notes):
    adapted = save_adapter(tiny_model_dir, tmp_path / "adapter", **options)
    result = export_lora(None, tmp_path / "adapter", tmp_path / "lora")
    assert result.notes == notes
    assert (result.rounding == 0) == (len(notes) == 1 and alpha == 12)
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert (config["rank_pattern"], config["alpha_pattern"]) == ({}, {})
    assert type(config["lora_alpha"]) is int
    assert config["lora_alpha"] == alpha
    for name, tensor in load_file(tmp_path / "lora" / "adapter_model.safetensors").items():
        assert tensor.shape[0 if "lora_A" in name else 1] == config["r"], name
    logits = lora_logits(tiny_model_dir, tmp_path / "lora")
    assert torch.allclose(logits, paca_logits(adapted), atol=1e-6)


@pytest.mark.usefixtures("forked_plain_peft")
def test_a_quantised_base_is_exported_and_verified(tmp_path):
    pytest.importorskip("bitsandbytes")
    build_model(64, hidden_size=64).save_pretrained(tmp_path / "plain")
    nf4 = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
    )
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", quantization_config=nf4)
    base.save_pretrained(tmp_path / "base")
    save_adapter(tmp_path / "base", tmp_path / "adapter")
    result = export_lora(None, tmp_path / "adapter", tmp_path / "lora", verify=True)
    assert result.num_modules == 6
    assert result.error.max_relative <= 1e-5
    keys = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    assert all(key.endswith((".lora_A.weight", ".lora_B.weight")) for key in keys)


@pytest.mark.parametrize("columns_from", ["dequantized", "original"])
@pytest.mark.usefixtures("forked_plain_peft")
def test_an_adapter_of_a_base_quantised_on_loading_is_verified_on_it(columns_from, tmp_path):
    build_model(64, hidden_size=64).save_pretrained(tmp_path / "base")
    quantization = {"method": "bitsandbytes", "type": "nf4", "block_size": 64, "double": True}
    options = {"quantization": quantization, "columns_from": columns_from}
    save_adapter(tmp_path / "base", tmp_path / "adapter", **options)
    result = export_lora(None, tmp_path / "adapter", tmp_path / "lora", verify=True)
    assert result.error.max_relative <= 1e-5
    (note,) = result.notes
    assert "quantised as 'bitsandbytes nf4, block_size 64, double'" in note
    assert ("and on no other" in note) == (columns_from == "original")


def test_fused_projections_are_exported(tmp_path):
    base = FAMILIES["Phi-3"].build()
    base.save_pretrained(tmp_path / "base")
    adapted = save_adapter(tmp_path / "base", tmp_path / "adapter", target_modules=None)
    export_lora(None, tmp_path / "adapter", tmp_path / "lora")
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert config["target_modules"] == ["down_proj", "gate_up_proj", "o_proj", "qkv_proj"]
    logits = lora_logits(tmp_path / "base", tmp_path / "lora")
    assert torch.allclose(logits, paca_logits(adapted), atol=1e-6)


def test_weights_stored_the_other_way_round(tmp_path):
    config = GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=50, n_positions=64)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "base")
    adapted = save_adapter(tmp_path / "base", tmp_path / "adapter", target_modules=["c_attn"])
    export_lora(None, tmp_path / "adapter", tmp_path / "lora")
    written = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert written["fan_in_fan_out"] is True
    logits = lora_logits(tmp_path / "base", tmp_path / "lora")
    assert torch.allclose(logits, paca_logits(adapted), atol=1e-6)


@pytest.mark.parametrize(("dtype", "most"), [("bfloat16", 2**-8), ("float16", 2**-11)])
def test_fewer_bits_round_b_alone_and_say_so(adapter_dir, tmp_path, dtype, most):
    result = export_lora(None, adapter_dir, tmp_path / "lora", dtype=dtype)
    assert 0 < result.rounding <= most
    tensors = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {getattr(torch, dtype)}


def test_values_too_large_for_the_dtype_are_refused(adapter_copy, tmp_path):
    path = adapter_copy / "adapter_model.safetensors"
    save_file({n: t * 10**6 if "delta" in n else t for n, t in load_file(path).items()}, path)
    with pytest.raises(ValueError, match=r"too big for torch\.float16; export in float32"):
        export_lora(None, adapter_copy, tmp_path / "lora", dtype="float16")
    assert not (tmp_path / "lora").exists()


def test_verifying_runs_plain_peft_in_a_new_process(tiny_model_dir, adapter_dir, tmp_path):
    result = export_lora(str(tiny_model_dir), adapter_dir, tmp_path / "lora", verify=True)
    assert result.error.max_relative <= 1e-5


def test_an_export_that_computes_something_else_is_refused(adapter_dir, tmp_path, monkeypatch):
    def outputs(base, model_class, folder, inputs, quantization, num_labels):
        return [torch.zeros(*batch["input_ids"].shape, 300) for batch in inputs]

    monkeypatch.setattr(export_module, "_run_plain_peft", outputs)
    with pytest.raises(
        ValueError, match=r"plain PEFT's outputs differ from the adapter's by .* \(1\.0e"
    ):
        export_lora(None, adapter_dir, tmp_path / "lora", verify=True)
    assert not (tmp_path / "lora").exists()


@pytest.mark.usefixtures("forked_plain_peft")
def test_an_export_that_plain_peft_cannot_load_is_refused(tiny_model_dir, adapter_dir, tmp_path):
    inputs = [{"input_ids": TOKENS}]
    with pytest.raises(ValueError, match=r"plain PEFT cannot load the exported adapter \(.*PACA"):
        export_module._run_plain_peft(str(tiny_model_dir), "LlamaForCausalLM", adapter_dir, inputs)


def test_pacatune_cannot_be_imported_where_plain_peft_runs(
    tiny_model_dir, adapter_dir, tmp_path, monkeypatch
):
    """A site hook that imports it would make even the PaCA adapter load."""
    (tmp_path / "sitecustomize.py").write_text("import pacatune\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    inputs = [{"input_ids": TOKENS}]
    with pytest.raises(ValueError, match="pacatune is imported when Python starts, so this would"):
        export_module._run_plain_peft(str(tiny_model_dir), "LlamaForCausalLM", adapter_dir, inputs)


@pytest.mark.parametrize(
    "extra", [{"modules_to_save": ["lm_head"]}, {"trainable_token_indices": [3, 5]}]
)
def test_what_lora_servers_do_not_load_is_refused_or_kept(tiny_model_dir, tmp_path, extra):
    adapted = save_adapter(tiny_model_dir, tmp_path / "adapter", **extra)
    with pytest.raises(ValueError, match=r"also holds 1 tensors that are not PaCA's.*--keep-extra"):
        export_lora(None, tmp_path / "adapter", tmp_path / "lora")
    export_lora(None, tmp_path / "adapter", tmp_path / "lora", keep_extra=True)
    logits = lora_logits(tiny_model_dir, tmp_path / "lora")
    assert torch.allclose(logits, paca_logits(adapted), atol=1e-6)


@pytest.mark.parametrize("bias", ["all", "paca_only"])
def test_trained_biases_are_kept_for_peft(tmp_path, bias):
    config = GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=50, n_positions=64)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "base")
    options = {"target_modules": ["c_attn"], "bias": bias}
    adapted = save_adapter(tmp_path / "base", tmp_path / "adapter", **options)
    export_lora(None, tmp_path / "adapter", tmp_path / "lora", keep_extra=True)
    logits = lora_logits(tmp_path / "base", tmp_path / "lora")
    assert torch.allclose(logits, paca_logits(adapted), atol=1e-6)


def test_shapes_come_from_the_configuration_alone(model_copy, adapter_dir, tmp_path):
    (model_copy / "model.safetensors").unlink()
    assert export_lora(str(model_copy), adapter_dir, tmp_path / "lora").num_modules == 6


def test_another_base_is_refused(model_copy, adapter_dir, tmp_path):
    path = model_copy / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"intermediate_size": 8}))
    with pytest.raises(ValueError, match=r"columns up to \d+, but the base .* has 8 columns"):
        export_lora(str(model_copy), adapter_dir, tmp_path / "lora")
    assert not (tmp_path / "lora").exists()


def test_a_lora_adapter_needs_no_export(lora_dir, tmp_path):
    with pytest.raises(ValueError, match=r"holds no `lora_mixer`; .* already needs no export"):
        export_lora(None, lora_dir, tmp_path / "lora")


def test_a_folder_in_use_is_refused(adapter_copy):
    with pytest.raises(FileExistsError, match="is not empty"):
        export_lora(None, adapter_copy, adapter_copy)


@pytest.mark.parametrize(
    ("effect", "dtype", "limit"),
    [
        (2.0, "float32", 1e-3),
        (2.0, "bfloat16", 1e-3 + 2 * 2**-5),
        (1e-3, "float32", 5e-4),  # Half of what the adapter changes.
        (0, "float32", 1e-3),
    ],
)
def test_what_rounding_explains(effect, dtype, limit):
    rounding = export_limit([torch.tensor([-10.0, 3])], effect, dtype)
    exact = OutputError(max_absolute=0.0, max_relative=0.0)
    kept = check_outputs(exact, rounding, effect, whose="", dtype=dtype, fix="")
    assert kept == pytest.approx(limit, rel=1e-3)
