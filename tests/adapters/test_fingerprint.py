"""R5: an adapter is put onto the base that it was trained on, and refused by any other."""

import json

import pytest
import torch
from torch import nn

from pacatune.adapters.base import empty_base, load_base
from pacatune.adapters.fingerprint import differing_modules, fingerprint, write_fingerprint
from pacatune.adapters.folder import read_adapter
from pacatune.adapters.loading import check_base, load_language_model
from pacatune.adapters.merge import merge
from tests.adapters.fixtures import edit_json, save_adapter

DOWN = "model.layers.0.mlp.down_proj"


def edit_fingerprint(folder, change):
    stored = json.loads((folder / "pacatune.json").read_text())["base_fingerprint"]
    change(stored)
    edit_json(folder / "pacatune.json", base_fingerprint=stored)


def test_the_base_of_training_passes_without_notes(adapter_dir, model, tiny_model_dir):
    model.config._name_or_path = "/elsewhere/renamed"  # the fingerprint says more
    assert check_base(adapter_dir, model) == []
    assert check_base(read_adapter(adapter_dir), model.to(torch.bfloat16)) == []
    empty = empty_base(str(tiny_model_dir), task_type="CAUSAL_LM")  # is compared by shape
    assert all(parameter.is_meta for parameter in empty.parameters())
    (note,) = check_base(adapter_dir, empty)
    assert note.startswith("6 of 6 adapted modules could not be compared by weight (not here, ")


def put(module):
    return lambda model: model.set_submodule(DOWN, module)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda model: model.model.layers.pop(1),
            r"has no module '.*layers\.1.* nearest .*layers\.0",
        ),
        (put(nn.Identity()), rf"no adaptable layer '{DOWN}'"),
        (put(nn.Linear(64, 48)), r"delta of \(32, 4\) .* but the base needs \(48, 4\)"),
        (put(nn.Linear(3, 32)), r"columns up to \d+, but the base .* has 3 columns"),
    ],
)
def test_other_modules_are_refused(adapter_dir, model, change, message):
    change(model)
    with pytest.raises(ValueError, match=message):
        check_base(adapter_dir, model)


def test_a_base_that_the_adapter_is_merged_into(adapter_dir, tiny_model_dir, tmp_path):
    """It would be applied twice, and the result verified against that."""
    merge(str(tiny_model_dir), adapter_dir, tmp_path / "merged")
    message = r"6 of 6 adapted modules.* have other values in its columns.*is merged into this base"
    with pytest.raises(ValueError, match=message):
        merge(str(tmp_path / "merged"), adapter_dir, tmp_path / "twice")
    assert not (tmp_path / "twice").exists()
    with pytest.raises(ValueError, match=message):
        load_language_model(str(tmp_path / "merged"), adapter_dir)
    allowed = str(tmp_path / "merged"), adapter_dir
    loaded = load_language_model(*allowed, allow_other_base=True)
    twice = merge(*allowed, tmp_path / "twice", allow_other_base=True)
    for result in (loaded, twice):
        assert "is merged into this base already" in result.notes[0]


def test_a_stored_architecture_is_compared(adapter_copy, model):
    edit_fingerprint(adapter_copy, lambda stored: stored.update(vocab_size=7))
    assert check_base(adapter_copy, model) == []  # it may grow
    for kind in ("modules", "trained"):
        edit_fingerprint(adapter_copy, lambda stored, kind=kind: stored[kind].popitem())
    (note,) = check_base(adapter_copy, model)
    assert note.startswith("1 of 6 adapted modules could not be compared")
    for key, value in (("num_hidden_layers", 3), ("hidden_size", 64), ("model_type", "gpt2")):
        edit_fingerprint(adapter_copy, lambda stored, new={key: value}: stored.update(new))
        message = rf"trained on a base with `{key}` = {value!r} but this one"
        with pytest.raises(ValueError, match=message):
            check_base(adapter_copy, model)


def test_without_a_fingerprint_the_name_decides(adapter_copy, model):
    (adapter_copy / "pacatune.json").unlink()
    (note,) = check_base(adapter_copy, model)
    assert note.startswith("the adapter has no fingerprint")
    model.config._name_or_path = "/elsewhere/tiny-mistral"
    message = r"names the base '.*tiny-llama.' but this one is '/elsewhere"
    with pytest.raises(ValueError, match=message):
        check_base(adapter_copy, model)
    assert len(check_base(adapter_copy, model, allow_other_base=True)) == 2


@pytest.mark.parametrize(
    "stored",
    [1, [], {"modules": {}}, {"modules": {"a": {"float32": 1}}, "trained": {}}, {"trained": 1}],
)
def test_a_malformed_fingerprint_is_refused(adapter_copy, model, stored):
    (adapter_copy / "pacatune.json").write_text(json.dumps({"base_fingerprint": stored}))
    with pytest.raises(ValueError, match="`base_fingerprint` must be an object with `modules`"):
        check_base(adapter_copy, model)


def test_other_tensors_must_have_their_place(tmp_path, tiny_model_dir, model):
    save_adapter(tiny_model_dir, tmp_path, modules_to_save=["lm_head"])
    assert list(read_adapter(tmp_path).extra) == ["base_model.model.lm_head.weight"]
    assert check_base(tmp_path, model) == []
    model.lm_head = nn.Linear(32, 5, bias=False)
    message = r"'lm_head\.weight' is \(300, 32\) in the adapter but \(5,"
    with pytest.raises(ValueError, match=message):
        check_base(tmp_path, model)
    del model.lm_head
    with pytest.raises(ValueError, match=r"has no parameter 'lm_head\.weight' that the adapter"):
        check_base(tmp_path, model)


# The fingerprint.


@pytest.fixture
def columns(adapter_dir):
    return {name: u.indices for name, u in read_adapter(adapter_dir).modules.items()}


def test_it_is_json_of_the_architecture_and_of_each_module(model, columns):
    result = fingerprint(model, columns)
    assert json.loads(json.dumps(result)) == result
    assert (result["architecture"], result["model_type"]) == ("LlamaForCausalLM", "llama")
    assert (result["hidden_size"], result["num_hidden_layers"]) == (32, 2)
    modules = result["modules"]
    assert modules.keys() == columns.keys()
    assert modules[DOWN].keys() == {"float32", "bfloat16", "float16"}
    assert len({hashes["float32"] for hashes in modules.values()}) == len(columns)
    with torch.no_grad():
        model.get_submodule(DOWN).weight.mul_(1 + 2**-22)  # what 16 bits do not show
    assert differing_modules(modules, fingerprint(model, columns)["modules"]) == ([DOWN], 6)
    # What cannot be read has no hashes.
    assert fingerprint(model, {DOWN: torch.arange(64)})["modules"] == {DOWN: {}}
    empty = fingerprint(model.to("meta"), columns)
    assert not any([*empty["modules"].values(), *empty["trained"].values()])


def test_writing_keeps_what_else_the_sidecar_holds(adapter_copy, model, tmp_path):
    path = adapter_copy / "pacatune.json"
    expected = json.loads(path.read_text())
    path.write_text(json.dumps({"other": 1}))
    write_fingerprint(adapter_copy, model)
    assert json.loads(path.read_text()) == {"other": 1, **expected}
    assert not list(adapter_copy.glob("*.partial"))
    with pytest.raises(FileNotFoundError, match=r"has no adapter_config.json"):
        write_fingerprint(tmp_path, model)


def test_it_is_the_same_around_an_active_and_a_merged_adapter(
    model, tiny_model_dir, tmp_path, columns
):
    """R2: it looks at the base."""
    expected = fingerprint(model, columns)
    adapted = save_adapter(tiny_model_dir, tmp_path / "adapter")
    assert fingerprint(adapted, columns) == expected
    adapted(input_ids=torch.ones(1, 3, dtype=torch.int64))  # writes the adapted columns
    assert fingerprint(adapted, columns) == expected
    adapted.merge_adapter()  # what is merged is not the base's
    assert fingerprint(adapted, columns) == {**expected, "trained": {}}


@pytest.mark.parametrize(
    ("stored", "current", "num_compared"),
    [
        ("float32", "bfloat16", 6),
        ("bfloat16", "float32", 6),
        ("float16", "float64", 6),
        ("bfloat16", "float16", 0),
    ],
)
def test_one_base_loaded_in_two_dtypes_does_not_differ(
    tiny_model_dir, columns, stored, current, num_compared
):
    first, second = (
        fingerprint(load_base(str(tiny_model_dir), task_type=None, dtype=dtype), columns)
        for dtype in (stored, current)
    )
    assert differing_modules(first["modules"], second["modules"]) == ([], num_compared)
