"""`PacaConfig(groups=G)`: what is chosen, saved and loaded.

Gradients are held by tests/residency and tests/ops, graphs by test_compiled.py.
"""

import copy
import json

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from pacatune import PacaConfig, lean
from pacatune.adapters.loading import hotswap_adapter
from pacatune.selection import load_columns
from tests.conftest import build_model
from tests.tuner.nets import evaluate

NAME = "model.layers.0.self_attn.q_proj"
FIXED = {"r": 4, "target_modules": ["q_proj", "down_proj"]}
IDS = torch.arange(24).view(2, 12)


def adapt(groups=4, base=None, **options):
    config = PacaConfig(**{**FIXED, "groups": groups, "init_weights": False, **options})
    return get_peft_model(build_model(300) if base is None else base, config)


def layer_of(model):
    return model.get_base_model().get_submodule(NAME)


def indices_of(model, adapter="default"):
    return layer_of(model).columns_of(adapter)


def logits(model):
    return evaluate(model, IDS).logits


def config_of(folder):
    return json.loads((folder / "adapter_config.json").read_text())


def test_a_strategy_chooses_the_pool():
    base, options = build_model(300), {"selection": "weight_norm"}
    kept = indices_of(adapt(1, base=copy.deepcopy(base), r=8, **options))
    layer = layer_of(adapt(4, base=base, pool=8, **options))
    assert layer.paca_indices["default"].equal(kept)


def test_one_group_writes_the_files_of_before(tmp_path):
    adapt(1).save_pretrained(tmp_path)
    assert not {"groups", "pool"} & config_of(tmp_path).keys()
    assert config_of(tmp_path)["peft_type"] == "PACA"
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert tensors[f"base_model.model.{NAME}.paca_indices"].shape == (4,)


def test_saved_loaded_and_refused_by_another_configuration(tmp_path):
    model = adapt()
    model.save_pretrained(tmp_path)
    config = config_of(tmp_path)
    assert (config["groups"], config["peft_type"]) == (4, "PACATUNE")
    loaded = PeftModel.from_pretrained(build_model(300), tmp_path)
    assert loaded.peft_config["default"].groups == 4
    assert indices_of(loaded).equal(indices_of(model))
    assert torch.equal(logits(loaded), logits(model))
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "groups": 2}))
    with pytest.raises(ValueError, match=r"has 4 row groups, and `groups` of its config.* is 2"):
        PeftModel.from_pretrained(build_model(300), tmp_path)


def test_an_adapter_of_earlier_versions(tmp_path):
    """Its indices are those of each group, of any number of columns, and it knows no pool."""
    model = adapt(pool=1000)
    model.save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    for name in [name for name in tensors if name.endswith("places")]:
        indices = name.replace("places", "indices")
        tensors[indices] = tensors[indices][tensors.pop(name)]
    save_file(tensors, path)
    config = config_of(tmp_path)
    del config["pool"]
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "random_seed": 1}))
    loaded = PeftModel.from_pretrained(build_model(300), tmp_path)
    assert indices_of(loaded).equal(indices_of(model))
    assert torch.equal(logits(loaded), logits(model))
    assert load_columns(tmp_path)[NAME] == indices_of(model).tolist()
    other = adapt()
    hotswap_adapter(other, tmp_path)
    torch.testing.assert_close(logits(other), logits(model))
    loaded.save_pretrained(tmp_path / "again")
    again = PeftModel.from_pretrained(build_model(300), tmp_path / "again")
    assert torch.equal(logits(again), logits(model))


def test_hotswap_of_other_groups_and_another_seed(tmp_path):
    """A reference adapter is made from the configuration alone."""
    other, model = adapt(2, random_seed=3), adapt(4, random_seed=5)
    other.save_pretrained(tmp_path)
    hotswap_adapter(model, tmp_path)
    torch.testing.assert_close(logits(model), logits(other))
    config = model.peft_config["default"]
    assert (config.groups, config.columns[NAME]) == (2, indices_of(other).tolist())
    model.add_adapter("reference", config)
    assert indices_of(model, "reference").equal(indices_of(model))


def test_given_columns(tmp_path):
    columns = {"q_proj": [[3, 1], [0, 1]], "down_proj": [[5, 6], [7, 9]]}
    model = adapt(2, r=2, selection=columns)
    assert model.peft_config["default"].selection == "fixed"
    model.save_pretrained(tmp_path)
    for one in (model, PeftModel.from_pretrained(build_model(300), tmp_path)):
        assert indices_of(one).tolist() == [[1, 3], [0, 1]]


def test_weighted_sums_have_all_columns_of_all_groups():
    model = adapt(4)
    model.add_adapter("one", PacaConfig(**FIXED, init_weights=False, random_seed=9))
    model.add_weighted_adapter(["default", "one"], [0.3, -2.0], "sum")
    layer = layer_of(model)
    assert model.peft_config["sum"].groups == 1
    distinct = torch.cat([indices_of(model).flatten(), indices_of(model, "one")]).unique()
    assert indices_of(model, "sum").equal(distinct)
    parts = (0.3 * layer.get_delta_weight("default"), -2.0 * layer.get_delta_weight("one"))
    torch.testing.assert_close(layer.get_delta_weight("sum"), sum(parts))


@pytest.mark.parametrize("level", [1, 2, 3])
def test_lean_models_compute_the_same(level):
    ids = torch.randint(0, 300, (2, 80), generator=torch.Generator().manual_seed(0))
    gradients = []
    for is_lean in (False, True):
        torch.manual_seed(0)
        model = adapt(4, build_model(300).double(), target_modules="all-linear").double().train()
        if is_lean:
            lean.enable(model, level=level)
        model(input_ids=ids, labels=ids).loss.backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    torch.testing.assert_close(*gradients, atol=1e-8, rtol=1e-6)  # the loss is float32
