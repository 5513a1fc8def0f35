"""A saved MosLoRA adapter: run, merged, described, and exported as an exact LoRA."""

import json

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from pacatune import MosLoraConfig
from pacatune.adapters.export import export_lora
from pacatune.adapters.folder import open_adapter
from pacatune.adapters.inspect import inspect_adapter
from pacatune.adapters.merge import merge
from tests.adapters import kinds
from tests.adapters.fixtures import edit_json, edit_tensors, logits_of
from tests.conftest import build_model
from tests.releases import needs

pytestmark = needs("peft", "0.19")


def save(path, folder, **options):
    """Save an adapter of a base with random values; return its logits."""
    base = AutoModelForCausalLM.from_pretrained(path)
    settings = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "down_proj"]}
    config = MosLoraConfig(**{**settings, "task_type": "CAUSAL_LM", **options})
    model = get_peft_model(base, config)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(std=0.2, generator=generator)
    model.save_pretrained(folder)
    return logits_of(model)


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "moslora"


@pytest.fixture
def saved(tiny_model_dir, folder):
    return save(tiny_model_dir, folder)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("llama", {}),
        ("llama", {"rank_pattern": {"down_proj": 2}, "alpha_pattern": {"q_proj": 5}}),
        ("llama", {"use_rslora": True, "lora_alpha": 3}),
        ("llama", {"modules_to_save": ["lm_head"]}),
        ("conv1d", {"target_modules": ["c_attn", "c_fc"]}),
    ],
)
def test_the_lora_computes_the_same(tiny_model_dir, folder, tmp_path, kind, options):
    base = tiny_model_dir
    if kind == "conv1d":
        base = tmp_path / "base"
        kinds.build(kind).save_pretrained(base)
    expected = save(base, folder, **options)
    result = export_lora(None, folder, tmp_path / "lora", keep_extra="modules_to_save" in options)
    assert (result.num_modules, result.base) == (4 if kind == "llama" else 2, str(base))
    assert 0 < result.rounding < 1e-7
    config = json.loads((tmp_path / "lora/adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], config["use_rslora"]) == ("LORA", 4, False)
    assert config["rank_pattern"] == config["alpha_pattern"] == {}
    assert config["fan_in_fan_out"] == (kind == "conv1d")
    names = load_file(tmp_path / "lora/adapter_model.safetensors")
    assert not [name for name in names if "mix" in name]
    lora = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "lora")
    torch.testing.assert_close(logits_of(lora), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
def test_merged(saved, folder, tmp_path):
    assert merge(None, folder, tmp_path / "merged").num_modules == 4
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits_of(merged), saved, rtol=1e-4, atol=1e-5)


def test_refused(tiny_model_dir, folder, tmp_path):
    save(tiny_model_dir, folder, modules_to_save=["lm_head"])
    build_model(300, hidden_size=16).save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match=r"1 tensors that are not MosLoRA's, first .*lm_head"):
        export_lora(None, folder, tmp_path / "lora")
    with pytest.raises(ValueError, match=r"has an update of .* but the base has .*; it was"):
        export_lora(str(tmp_path / "other"), folder, tmp_path / "lora", keep_extra=True)
    for changes, message in (
        ({"mixer_init": "eval"}, r"`mixer_init` \('eval'\) must be one of"),
        ({"mixer_inti": "kaiming"}, r"unknown key 'mixer_inti'; the nearest .* 'mixer_init'"),
    ):
        edit_json(folder / "adapter_config.json", **changes)
        with pytest.raises(ValueError, match=message):
            open_adapter(folder)


INCOMPLETE = r"must have lora_B \(O, 4\), lora_mixer \(4, 4\) and lora_A \(4, I\), and has"


@pytest.mark.parametrize(
    ("lost", "message"),
    [
        ("0.self_attn.q_proj.lora_mixer", INCOMPLETE),
        ("0.self_attn.q_proj.lora_A", INCOMPLETE),
        ("lora", "holds no `lora_mixer`; save the adapter again"),
    ],
)
@pytest.mark.usefixtures("saved")
def test_an_incomplete_file(folder, tmp_path, lost, message):
    def lose(tensors):
        for name in [one for one in tensors if lost in one]:
            del tensors[name]
        tensors["a"] = torch.ones(1)

    edit_tensors(folder, lose)
    with pytest.raises(ValueError, match=message):
        export_lora(None, folder, tmp_path / "lora", keep_extra=True)


@pytest.mark.usefixtures("saved")
def test_description(folder, tmp_path):
    report = inspect_adapter(folder)
    assert (report.method, report.rank, report.selection) == ("MOSLORA", 4, None)
    assert report.extra == []
    assert "can be exported as an exact LoRA adapter" in report.notes[0]
    export_lora(None, folder, tmp_path / "lora")
    lora = inspect_adapter(tmp_path / "lora")
    norms = {module.name: module.update_norm for module in report.modules}
    assert {m.name: m.update_norm for m in lora.modules} == pytest.approx(norms, rel=1e-5)
    assert report.num_trainable_parameters == lora.num_trainable_parameters + 4 * 4 * 4
