"""Adapters described, without their base."""

import json

import pytest
import torch
from safetensors.torch import save_file

from pacatune.adapters.folder import read_adapter
from pacatune.adapters.inspect import inspect_adapter
from tests.adapters.fixtures import save_adapter


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
    delta, indices, _ = read_adapter(adapter_dir).modules[report.modules[0].name]
    assert norms[0] == pytest.approx(2 * float(delta.norm()))
    assert report.modules[0].columns == indices.tolist()


def test_what_is_trained_beside_columns_is_named(tmp_path, tiny_model_dir):
    options = {"rank_pattern": {"q_proj": 2}, "modules_to_save": ["lm_head"]}
    save_adapter(tiny_model_dir, tmp_path, **options)
    report = inspect_adapter(tmp_path)
    assert report.extra == ["base_model.model.lm_head.weight"]
    assert report.num_trainable_parameters == 300 * 32 + 2 * (2 * 32 + 4 * 16 + 4 * 32)


def test_a_lora_adapter_is_described_by_its_configuration(lora_dir):
    report = inspect_adapter(lora_dir)
    assert (report.method, report.rank, report.scaling, report.selection) == ("LORA", 4, 16, None)
    assert report.targets == ["down_proj", "q_proj", "v_proj"]
    assert report.num_trainable_parameters == 2 * 4 * (64 + 48 + 96)
    assert (report.modules, len(report.extra)) == ([], 12)


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
    for config in ({"r": "x"}, {"lora_alpha": []}, {"target_modules": 5}):
        assert other({"peft_type": "LORA", **config}, tensors).extra == [*tensors]
