import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from pacatune.adapters.inspect import inspect_adapter
from pacatune.adapters.loading import answered_warnings
from tests.adapters.fixtures import save_adapter


def test_a_paca_adapter_is_described_in_full(adapter_dir, tiny_model_dir):
    report = inspect_adapter(adapter_dir)
    assert (report.method, report.base, report.task_type) == (
        "PACA",
        str(tiny_model_dir),
        "CAUSAL_LM",
    )
    assert (report.rank, report.alpha, report.scaling) == (4, 8, 2)
    assert report.selection == "random"
    assert report.num_modules_by_kind == {"q_proj": 2, "v_proj": 2, "down_proj": 2}
    assert report.num_trainable_parameters == 2 * 4 * (32 + 16 + 32)
    assert report.file_bytes == (adapter_dir / "adapter_model.safetensors").stat().st_size
    assert not report.extra
    norms = [module.update_norm for module in report.modules]
    assert norms == sorted(norms, reverse=True)
    tensors = load_file(adapter_dir / "adapter_model.safetensors")
    key = f"base_model.model.{report.modules[0].name}"
    assert norms[0] == pytest.approx(2 * float(tensors[f"{key}.paca_delta"].norm()))
    assert report.modules[0].columns == tensors[f"{key}.paca_indices"].tolist()


def test_what_only_we_can_read_is_said(tmp_path, tiny_model_dir):
    plain = save_adapter(tiny_model_dir, tmp_path / "plain", with_fingerprint=False)
    assert plain is not None
    notes = " ".join(inspect_adapter(tmp_path / "plain").notes)
    assert "PEFT 0.22 and newer read it without pacatune" in notes
    assert "exported as an exact LoRA adapter" in notes
    assert "no pacatune.json with a fingerprint" in notes
    options = {"rank_pattern": {"q_proj": 2}, "modules_to_save": ["lm_head"]}
    save_adapter(tiny_model_dir, tmp_path / "ours", **options)
    report = inspect_adapter(tmp_path / "ours")
    notes = " ".join(report.notes)
    assert "needs pacatune: PEFT's own PaCA (0.22 and newer) does not know `rank_pattern`" in notes
    assert "`export` needs --keep-extra" in notes
    assert "fingerprint" not in notes
    assert report.extra == ["base_model.model.lm_head.weight"]
    assert report.num_trainable_parameters == 300 * 32 + 2 * (2 * 32 + 4 * 16 + 4 * 32)


def test_row_groups_are_described(tiny_model_dir, tmp_path):
    save_adapter(tiny_model_dir, tmp_path / "ours", groups=4)
    report = inspect_adapter(tmp_path / "ours")
    assert report.num_trainable_parameters == 2 * 4 * (32 + 16 + 32)
    tensors = load_file(tmp_path / "ours" / "adapter_model.safetensors")
    for module in report.modules:
        indices = tensors[f"base_model.model.{module.name}.paca_indices"]
        assert module.rank == 4
        assert module.columns == indices.unique().tolist()
        assert module.columns_of_groups == indices.tolist()
    notes = " ".join(report.notes)
    largest = max(len(module.columns) for module in report.modules)
    assert f"4 row groups: each update has rank up to {largest}" in notes
    assert "does not know `groups`" in notes


def test_an_untrained_adapter_is_said(adapter_copy):
    path = adapter_copy / "adapter_model.safetensors"
    save_file({n: t * 0 if "delta" in n else t for n, t in load_file(path).items()}, path)
    assert any("every delta is zero" in note for note in inspect_adapter(adapter_copy).notes)


def test_a_lora_adapter_is_described_by_its_factors(tiny_model_dir, tmp_path):
    base = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    config = LoraConfig(r=3, lora_alpha=6, target_modules=["q_proj"], init_lora_weights=False)
    with answered_warnings():
        model = get_peft_model(base, config)
        model.save_pretrained(tmp_path / "lora")
    report = inspect_adapter(tmp_path / "lora")
    assert (report.method, report.rank, report.scaling, report.selection) == ("LORA", 3, 2, None)
    assert report.targets == ["q_proj"]
    assert report.num_trainable_parameters == 2 * 3 * (32 + 32)
    (module, _) = report.modules
    layer = model.get_base_model().get_submodule(module.name)
    norm = layer.get_delta_weight("default").detach().norm()
    assert module.update_norm == pytest.approx(float(norm))
    assert module.columns is None


def test_other_methods_are_described_by_their_size(adapter_copy):
    path = adapter_copy / "adapter_config.json"
    path.write_text(json.dumps({"peft_type": "IA3", "target_modules": "a.*b"}))
    tensors = {"base_model.model.q.ia3_l": torch.ones(7, 1)}
    save_file(tensors, adapter_copy / "adapter_model.safetensors")
    report = inspect_adapter(adapter_copy)
    assert (report.method, report.rank, report.scaling) == ("IA3", None, None)
    assert report.targets == ["a.*b"]
    assert (report.num_trainable_parameters, report.modules) == (7, [])


@pytest.mark.parametrize("method", [None, 3, {}])
def test_a_configuration_without_a_method_is_refused(adapter_copy, method):
    (adapter_copy / "adapter_config.json").write_text(json.dumps({"peft_type": method}))
    with pytest.raises(ValueError, match=r"gives `peft_type` = .*; it must name a PEFT method"):
        inspect_adapter(adapter_copy)


@pytest.mark.parametrize("config", [{"r": "x"}, {"lora_alpha": []}, {"target_modules": 5}])
def test_odd_values_of_other_methods_do_no_harm(adapter_copy, config):
    path = adapter_copy / "adapter_config.json"
    path.write_text(json.dumps({"peft_type": "LORA", **config}))
    tensors = {"q.lora_A.weight": torch.ones(1, 2), "q.lora_B.weight": torch.ones(2, 1)}
    tensors |= {"k.lora_A.weight": torch.ones(3, 2), "k.lora_B.weight": torch.ones(2, 1)}
    save_file(tensors, adapter_copy / "adapter_model.safetensors")
    report = inspect_adapter(adapter_copy)
    assert report.method == "LORA"
    assert [module.name for module in report.modules] == ["q"]
    assert report.extra == ["k.lora_A.weight", "k.lora_B.weight"]
