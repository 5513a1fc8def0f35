import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from pacatune.adapters.base import load_base
from pacatune.adapters.folder import open_adapter, read_adapter
from pacatune.adapters.loading import attach
from tests.adapters.fixtures import save_adapter

TOKENS = torch.arange(24).view(2, 12)


@pytest.fixture
def model(tiny_model_dir):
    return load_base(str(tiny_model_dir), task_type="CAUSAL_LM")


def test_an_attached_adapter_computes_what_was_saved(tiny_model_dir, tmp_path, model):
    saved = save_adapter(tiny_model_dir, tmp_path / "adapter", rank_pattern={"v_proj": 2})
    attached, notes = attach(model, read_adapter(tmp_path / "adapter"))
    assert notes == []
    assert not attached.training
    with torch.no_grad():
        expected = saved(TOKENS).logits
        assert torch.equal(attached(TOKENS).logits, expected)
        with attached.disable_adapter():
            assert not torch.allclose(attached(TOKENS).logits, expected, atol=1e-3)


def test_an_adapter_of_another_base_is_refused_before_peft_sees_it(adapter_dir, model):
    model.model.layers[0].mlp.down_proj = torch.nn.Linear(64, 48)
    with pytest.raises(ValueError, match="belongs to another base"):
        attach(model, read_adapter(adapter_dir))
    assert not hasattr(model, "peft_config")


def test_a_configuration_that_adapts_more_than_the_file_is_refused(adapter_copy, model):
    path = adapter_copy / "adapter_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"target_modules": [*config["target_modules"], "k_proj"]}))
    message = r"'model\.layers\.0\.self_attn\.k_proj' is adapted by its configuration only \(2 such"
    with pytest.raises(ValueError, match=message):
        attach(model, read_adapter(adapter_copy))


def test_a_file_that_adapts_more_than_the_configuration_is_refused(adapter_copy, model):
    path = adapter_copy / "adapter_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"target_modules": ["q_proj", "v_proj"]}))
    message = r"down_proj\.paca_(delta|indices)', but this model has no such adapted module"
    with pytest.raises(ValueError, match=message):
        attach(model, read_adapter(adapter_copy))


def test_columns_of_the_file_win_over_those_of_the_seed(adapter_copy, model):
    path = adapter_copy / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"random_seed": 12345}))
    adapter = read_adapter(adapter_copy)
    attached, _ = attach(model, adapter)
    name = "model.layers.0.mlp.down_proj"
    layer = attached.get_base_model().get_submodule(name)
    assert torch.equal(layer.paca_indices["default"], adapter.modules[name].indices)


def test_values_that_do_not_arrive_are_noticed(adapter_copy, model):
    adapter = read_adapter(adapter_copy)
    path = adapter_copy / "adapter_model.safetensors"
    changed = {n: t + 1 if "delta" in n else t for n, t in load_file(path).items()}
    save_file(changed, path.with_suffix(".new"))
    path.with_suffix(".new").replace(path)  # the old file stays mapped
    with pytest.raises(ValueError, match="does not hold the file's values after loading"):
        attach(model, adapter)


def test_a_lora_adapter_with_missing_tensors_is_refused(lora_dir, tmp_path, model):
    folder = shutil.copytree(lora_dir, tmp_path / "lora")
    path = folder / "adapter_model.safetensors"
    save_file({n: t for n, t in load_file(path).items() if "v_proj" not in n}, path)
    with pytest.raises(ValueError, match=r"PEFT cannot load the adapter .*missing adapter keys"):
        attach(model, open_adapter(folder))
