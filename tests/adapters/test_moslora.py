"""A saved MosLoRA adapter: run, merged, described, and exported as an exact LoRA."""

import json
import shutil

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from pacatune import MosLoraConfig
from pacatune.adapters.export import export_lora
from pacatune.adapters.folder import open_adapter
from pacatune.adapters.inspect import inspect_adapter
from pacatune.adapters.merge import merge
from tests.conftest import build_model
from tests.releases import needs

pytestmark = needs("peft", "0.19")

TOKENS = torch.arange(24).view(2, 12)


def logits_of(model):
    with torch.no_grad():
        return model.eval()(TOKENS).logits


def save(base, folder, path, **options):
    """Save an adapter with random values; return its logits."""
    settings = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "down_proj"]}
    config = MosLoraConfig(**{**settings, "task_type": "CAUSAL_LM", **options})
    model = get_peft_model(base, config)
    model.peft_config["default"].base_model_name_or_path = str(path)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(std=0.2, generator=generator)
    model.save_pretrained(folder)
    return logits_of(model)


@pytest.fixture
def saved(tiny_model_dir, tmp_path):
    base = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    return save(base, tmp_path / "moslora", tiny_model_dir)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"rank_pattern": {"down_proj": 2}, "alpha_pattern": {"q_proj": 5}},
        {"use_rslora": True, "lora_alpha": 3},
        {"modules_to_save": ["lm_head"]},
    ],
)
def test_the_lora_computes_the_same(tiny_model_dir, tmp_path, options):
    base = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    expected = save(base, tmp_path / "moslora", tiny_model_dir, **options)
    keep = bool(options.get("modules_to_save"))
    result = export_lora(None, tmp_path / "moslora", tmp_path / "lora", keep_extra=keep)
    assert (result.num_modules, result.base) == (4, str(tiny_model_dir))
    assert 0 < result.rounding < 1e-7
    config = json.loads((tmp_path / "lora/adapter_config.json").read_text())
    assert (config["peft_type"], config["r"]) == ("LORA", 4)
    assert config["rank_pattern"] == config["alpha_pattern"] == {}
    assert config["use_rslora"] is False
    assert not [
        name for name in load_file(tmp_path / "lora/adapter_model.safetensors") if "mix" in name
    ]
    base = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    lora = PeftModel.from_pretrained(base, tmp_path / "lora")
    torch.testing.assert_close(logits_of(lora), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("forked_plain_peft")
def test_verified_by_plain_peft(saved, tmp_path):
    result = export_lora(None, tmp_path / "moslora", tmp_path / "lora", verify=True)
    assert result.error.max_relative < 1e-5


def test_conv1d(tmp_path):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        base = GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=32))
    base.save_pretrained(tmp_path / "base")
    expected = save(base, tmp_path / "moslora", tmp_path / "base", target_modules=["c_attn"])
    export_lora(None, tmp_path / "moslora", tmp_path / "lora")
    assert json.loads((tmp_path / "lora/adapter_config.json").read_text())["fan_in_fan_out"]
    base = GPT2LMHeadModel.from_pretrained(tmp_path / "base")
    lora = PeftModel.from_pretrained(base, tmp_path / "lora")
    torch.testing.assert_close(logits_of(lora), expected, rtol=1e-5, atol=1e-5)


def test_what_does_not_fit_in_16_bits(saved, tmp_path):
    path = tmp_path / "moslora/adapter_model.safetensors"
    tensors = load_file(path)
    name = next(name for name in tensors if "lora_B" in name)
    tensors[name] *= 1e6
    save_file(tensors, path)
    with pytest.raises(ValueError, match=r"too big for torch.float16; export in float32"):
        export_lora(None, tmp_path / "moslora", tmp_path / "lora", dtype="float16")


def test_other_tensors_are_refused(tiny_model_dir, tmp_path):
    base = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    save(base, tmp_path / "moslora", tiny_model_dir, modules_to_save=["lm_head"])
    with pytest.raises(ValueError, match=r"1 tensors that are not MosLoRA's, first .*lm_head"):
        export_lora(None, tmp_path / "moslora", tmp_path / "lora")


def test_another_base(saved, tmp_path):
    build_model(300, hidden_size=16).save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match=r"has an update of .* but the base has .*; it was"):
        export_lora(str(tmp_path / "other"), tmp_path / "moslora", tmp_path / "lora")


@pytest.mark.parametrize("lost", ["lora_mixer", "lora_A", "all"])
def test_an_incomplete_file(saved, tmp_path, lost):
    path = tmp_path / "moslora/adapter_model.safetensors"
    tensors = load_file(path)
    if lost == "all":
        tensors, message = {"a": torch.ones(1)}, "holds no `lora_mixer`; save the adapter again"
    else:
        del tensors[next(name for name in tensors if lost in name)]
        message = r"must have lora_B \(O, 4\), lora_mixer \(4, 4\) and lora_A \(4, I\), and has"
    save_file(tensors, path)
    with pytest.raises(ValueError, match=message):
        export_lora(None, tmp_path / "moslora", tmp_path / "lora")


def test_description(saved, tmp_path):
    report = inspect_adapter(tmp_path / "moslora")
    assert (report.method, report.rank, report.selection) == ("MOSLORA", 4, None)
    assert report.extra == []
    assert "can be exported as an exact LoRA adapter" in report.notes[0]
    export_lora(None, tmp_path / "moslora", tmp_path / "lora")
    lora = inspect_adapter(tmp_path / "lora")
    norms = {module.name: module.update_norm for module in report.modules}
    assert {m.name: m.update_norm for m in lora.modules} == pytest.approx(norms, rel=1e-5)
    assert report.num_trainable_parameters == lora.num_trainable_parameters + 4 * 4 * 4


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
def test_merging(saved, tiny_model_dir, tmp_path):
    result = merge(str(tiny_model_dir), tmp_path / "moslora", tmp_path / "merged")
    assert result.num_modules == 4
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits_of(merged), saved, rtol=1e-4, atol=1e-5)


def test_configurations_of_strangers(saved, tmp_path):
    folder = shutil.copytree(tmp_path / "moslora", tmp_path / "copy")
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "mixer_init": "eval"}))
    with pytest.raises(ValueError, match=r"`mixer_init` \('eval'\) must be one of"):
        open_adapter(folder)
    path.write_text(json.dumps({**config, "mixer_inti": "kaiming"}))
    with pytest.raises(ValueError, match="unknown key 'mixer_inti'; the nearest known one is 'mix"):
        open_adapter(folder)
