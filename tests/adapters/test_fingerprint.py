import json

import pytest
import torch

from pacatune.adapters.base import load_base
from pacatune.adapters.fingerprint import differing_modules, fingerprint, write_fingerprint
from pacatune.adapters.folder import read_adapter
from tests.adapters.fixtures import save_adapter

MODULE = "model.layers.0.mlp.down_proj"


@pytest.fixture
def columns(adapter_dir):
    return {name: u.indices for name, u in read_adapter(adapter_dir).modules.items()}


def base(folder, dtype="float32"):
    return load_base(str(folder), task_type="CAUSAL_LM", dtype=dtype)


def test_it_is_json_and_names_the_architecture(tiny_model_dir, columns):
    result = fingerprint(base(tiny_model_dir), columns)
    assert json.loads(json.dumps(result)) == result
    assert (result["architecture"], result["model_type"]) == ("LlamaForCausalLM", "llama")
    assert (result["hidden_size"], result["num_hidden_layers"]) == (32, 2)
    assert result["modules"].keys() == columns.keys()
    assert result["modules"][MODULE].keys() == {"float32", "bfloat16", "float16"}
    assert len({hashes["float32"] for hashes in result["modules"].values()}) == len(columns)


def test_it_is_the_same_around_an_active_and_a_merged_adapter(tiny_model_dir, tmp_path, columns):
    expected = fingerprint(base(tiny_model_dir), columns)
    model = save_adapter(tiny_model_dir, tmp_path / "adapter")
    assert fingerprint(model, columns) == expected
    model(input_ids=torch.ones(1, 3, dtype=torch.int64))  # writes the adapted columns
    assert fingerprint(model, columns) == expected
    model.merge_adapter()
    assert fingerprint(model, columns) == expected


@pytest.mark.parametrize(
    ("stored", "current", "num_compared"),
    [
        ("float32", "bfloat16", 6),
        ("bfloat16", "float32", 6),
        ("float16", "float64", 6),
        ("bfloat16", "bfloat16", 6),
        ("bfloat16", "float16", 0),
    ],
)
def test_one_base_loaded_in_two_dtypes_does_not_differ(
    tiny_model_dir, columns, stored, current, num_compared
):
    first = fingerprint(base(tiny_model_dir, stored), columns)["modules"]
    second = fingerprint(base(tiny_model_dir, current), columns)["modules"]
    assert differing_modules(first, second) == ([], num_compared)


def test_a_slightly_trained_module_differs(tiny_model_dir, columns):
    model = base(tiny_model_dir)
    first = fingerprint(model, columns)["modules"]
    with torch.no_grad():
        model.get_submodule(MODULE).weight.mul_(1.001)
    assert differing_modules(first, fingerprint(model, columns)["modules"]) == ([MODULE], 6)


def test_weights_that_cannot_be_read_have_no_hashes(tiny_model_dir, columns):
    model = base(tiny_model_dir).to("meta")
    assert not any(fingerprint(model, columns)["modules"].values())
    every_column = {MODULE: torch.arange(64)}
    assert fingerprint(base(tiny_model_dir), every_column)["modules"] == {MODULE: {}}


def test_writing_keeps_what_else_the_sidecar_holds(adapter_copy, tiny_model_dir):
    path = adapter_copy / "pacatune.json"
    expected = json.loads(path.read_text())
    path.write_text(json.dumps({"other": 1}))
    write_fingerprint(adapter_copy, base(tiny_model_dir))
    assert json.loads(path.read_text()) == {"other": 1, **expected}
    assert not list(adapter_copy.glob("*.partial"))


def test_writing_into_a_folder_without_an_adapter_is_refused(tmp_path, tiny_model_dir):
    with pytest.raises(FileNotFoundError, match=r"has no adapter_config.json"):
        write_fingerprint(tmp_path, base(tiny_model_dir))
