"""Adapters described, without their base."""

import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file

from pacatune.adapters.folder import read_adapter
from pacatune.adapters.inspect import inspect_adapter
from pacatune.adapters.loading import answered_warnings
from tests.adapters.fixtures import save_adapter, scale


def test_a_paca_adapter_is_described_in_full(adapter_dir, tiny_model_dir):
    report = inspect_adapter(adapter_dir)
    assert (report.method, report.base) == ("PACA", str(tiny_model_dir))
    assert (report.task_type, report.selection) == ("CAUSAL_LM", "random")
    assert (report.rank, report.alpha, report.scaling) == (4, 8, 2)
    assert report.num_modules_by_kind == {"q_proj": 2, "v_proj": 2, "down_proj": 2}
    assert report.num_trainable_parameters == 2 * 4 * (32 + 16 + 32)
    assert report.file_bytes == (adapter_dir / "adapter_model.safetensors").stat().st_size
    assert not report.extra
    norms = [module.update_norm for module in report.modules]
    assert norms == sorted(norms, reverse=True)
    delta, indices = read_adapter(adapter_dir).modules[report.modules[0].name]
    assert norms[0] == pytest.approx(2 * float(delta.norm()))
    assert report.modules[0].columns == indices.tolist()


def test_what_only_we_can_read_is_said(tmp_path, tiny_model_dir):
    save_adapter(tiny_model_dir, tmp_path / "plain", with_fingerprint=False)
    notes = " ".join(inspect_adapter(tmp_path / "plain").notes)
    assert "PEFT 0.22 and newer read it without pacatune" in notes
    assert "exported as an exact LoRA adapter" in notes
    assert "no pacatune.json with a fingerprint" in notes
    options = {"rank_pattern": {"q_proj": 2}, "modules_to_save": ["lm_head"]}
    save_adapter(tiny_model_dir, tmp_path / "ours", **options)
    report = inspect_adapter(tmp_path / "ours")
    notes = " ".join(report.notes)
    assert "needs pacatune: PEFT's own PaCA (0.22 and newer) does not know `rank_pattern`" in notes
    assert "`export` needs --keep_extra" in notes
    assert "fingerprint" not in notes
    assert report.extra == ["base_model.model.lm_head.weight"]
    assert report.num_trainable_parameters == 300 * 32 + 2 * (2 * 32 + 4 * 16 + 4 * 32)


def test_an_untrained_adapter_is_said(adapter_copy):
    scale(adapter_copy, 0)
    assert any("every delta is zero" in note for note in inspect_adapter(adapter_copy).notes)


def test_a_lora_adapter_is_described_by_its_factors(model, tmp_path):
    config = LoraConfig(r=3, lora_alpha=6, target_modules=["q_proj"], init_lora_weights=False)
    with answered_warnings():
        lora = get_peft_model(model, config)
        lora.save_pretrained(tmp_path)
    report = inspect_adapter(tmp_path)
    assert (report.method, report.rank, report.scaling, report.selection) == ("LORA", 3, 2, None)
    assert report.targets == ["q_proj"]
    assert report.num_trainable_parameters == 2 * 3 * (32 + 32)
    (module, _) = report.modules
    delta = lora.get_base_model().get_submodule(module.name).get_delta_weight("default")
    assert module.update_norm == pytest.approx(float(delta.detach().norm()))
    assert module.columns is None


@pytest.fixture
def other(tmp_path):
    """Write the adapter of another method; return its report."""

    def write(config, tensors):
        (tmp_path / "adapter_config.json").write_text(json.dumps(config))
        save_file(tensors, tmp_path / "adapter_model.safetensors")
        return inspect_adapter(tmp_path)

    return write


def test_other_methods_are_described_by_their_size(other):
    tensors = {"base_model.model.q.ia3_l": torch.ones(7, 1)}
    report = other({"peft_type": "IA3", "target_modules": "a.*b"}, tensors)
    assert (report.method, report.rank, report.scaling) == ("IA3", None, None)
    assert report.targets == ["a.*b"]
    assert (report.num_trainable_parameters, report.modules) == (7, [])
    for method in (None, 3, {}):
        with pytest.raises(ValueError, match=r"gives `peft_type` = .*; it must name a PEFT method"):
            other({"peft_type": method}, {"a": torch.ones(1)})
    # Odd values do no harm.
    tensors = {"q.lora_A.weight": torch.ones(1, 2), "q.lora_B.weight": torch.ones(2, 1)}
    tensors |= {"k.lora_A.weight": torch.ones(3, 2), "k.lora_B.weight": torch.ones(2, 1)}
    for config in ({"r": "x"}, {"lora_alpha": []}, {"target_modules": 5}):
        report = other({"peft_type": "LORA", **config}, tensors)
        assert [module.name for module in report.modules] == ["q"]
        assert report.extra == ["k.lora_A.weight", "k.lora_B.weight"]
