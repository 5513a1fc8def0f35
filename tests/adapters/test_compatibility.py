import json

import pytest
import torch
from torch import nn

from pacatune.adapters.base import empty_base, load_base
from pacatune.adapters.folder import read_adapter
from pacatune.adapters.loading import check_base
from tests.adapters.fixtures import save_adapter


@pytest.fixture
def model(tiny_model_dir):
    return load_base(str(tiny_model_dir), task_type="CAUSAL_LM")


@pytest.fixture
def without_fingerprint(adapter_copy):
    (adapter_copy / "pacatune.json").unlink()
    return adapter_copy


def edit_fingerprint(folder, change):
    path = folder / "pacatune.json"
    sidecar = json.loads(path.read_text())
    change(sidecar["base_fingerprint"])
    path.write_text(json.dumps(sidecar))


def test_the_base_of_training_passes_without_notes(adapter_dir, model):
    assert check_base(adapter_dir, model) == []
    assert check_base(read_adapter(adapter_dir), model.to(torch.bfloat16)) == []


def test_a_base_without_weights_is_compared_by_shape(adapter_dir, tiny_model_dir):
    empty = empty_base(str(tiny_model_dir), task_type="CAUSAL_LM")
    assert all(parameter.is_meta for parameter in empty.parameters())
    assert check_base(adapter_dir, empty) == []


def test_a_missing_module_is_named_with_the_nearest(adapter_dir, model):
    del model.model.layers[1]
    message = (
        r"LlamaForCausalLM\) has no module 'model\.layers\.1.*nearest name is 'model\.layers\.0"
    )
    with pytest.raises(ValueError, match=message):
        check_base(adapter_dir, model)


def test_a_module_that_is_not_linear_is_refused(adapter_dir, model):
    model.model.layers[0].mlp.down_proj = nn.Identity()
    with pytest.raises(ValueError, match=r"no adaptable layer 'model\.layers\.0\.mlp\.down_proj'"):
        check_base(adapter_dir, model)


def test_other_sizes_are_refused(adapter_dir, model):
    model.model.layers[0].mlp.down_proj = nn.Linear(64, 48)
    with pytest.raises(ValueError, match=r"delta of \(32, 4\) .* but the base needs \(48, 4\)"):
        check_base(adapter_dir, model)
    model.model.layers[0].mlp.down_proj = nn.Linear(3, 32)
    with pytest.raises(ValueError, match=r"columns up to \d+, but the base .* has 3 columns"):
        check_base(adapter_dir, model)


def test_other_weights_are_refused_unless_allowed(adapter_dir, model):
    with torch.no_grad():
        model.model.layers[1].self_attn.v_proj.weight.add_(1e-3)
    message = (
        r"weights of 1 of 6 adapted modules are not .* first 'model\.layers\.1\.self_attn\.v_proj'"
    )
    with pytest.raises(ValueError, match=message + r".*--allow-other-base"):
        check_base(adapter_dir, model)
    (note,) = check_base(adapter_dir, model, allow_other_base=True)
    assert "weights of 1 of 6" in note


@pytest.mark.parametrize(
    ("key", "value"), [("model_type", "gpt2"), ("hidden_size", 64), ("num_hidden_layers", 3)]
)
def test_another_architecture_is_refused(adapter_copy, model, key, value):
    edit_fingerprint(adapter_copy, lambda stored: stored.update({key: value}))
    with pytest.raises(
        ValueError, match=rf"trained on a base with `{key}` = {value!r} but this one"
    ):
        check_base(adapter_copy, model)


def test_a_grown_vocabulary_is_not_another_base(adapter_copy, model):
    edit_fingerprint(adapter_copy, lambda stored: stored.update(vocab_size=7))
    assert check_base(adapter_copy, model) == []


def test_modules_that_cannot_be_compared_are_noted(adapter_copy, model):
    edit_fingerprint(adapter_copy, lambda stored: stored["modules"].popitem())
    (note,) = check_base(adapter_copy, model)
    assert note.startswith("1 of 6 adapted modules could not be compared")


def test_without_a_fingerprint_the_name_decides(without_fingerprint, model):
    (note,) = check_base(without_fingerprint, model)
    assert note.startswith("the adapter has no fingerprint")
    model.config._name_or_path = "/elsewhere/tiny-mistral"
    with pytest.raises(
        ValueError, match=r"names the base '.*tiny-llama.' but this one is '/elsewhere"
    ):
        check_base(without_fingerprint, model)
    assert len(check_base(without_fingerprint, model, allow_other_base=True)) == 2


def test_with_a_fingerprint_the_name_may_differ(adapter_dir, model):
    model.config._name_or_path = "/elsewhere/renamed"
    assert check_base(adapter_dir, model) == []


@pytest.mark.parametrize("stored", [1, [], {}, {"modules": 1}, {"modules": {"a": {"float32": 1}}}])
def test_a_malformed_fingerprint_is_refused(adapter_copy, model, stored):
    (adapter_copy / "pacatune.json").write_text(json.dumps({"base_fingerprint": stored}))
    with pytest.raises(ValueError, match="`base_fingerprint` must be an object with `modules`"):
        check_base(adapter_copy, model)


def test_other_tensors_must_have_their_place(tmp_path, tiny_model_dir, model):
    save_adapter(tiny_model_dir, tmp_path / "adapter", modules_to_save=["lm_head"])
    adapter = read_adapter(tmp_path / "adapter")
    assert list(adapter.extra) == ["base_model.model.lm_head.weight"]
    assert check_base(adapter, model) == []
    model.lm_head = nn.Linear(32, 5, bias=False)
    with pytest.raises(
        ValueError, match=r"'lm_head\.weight' is \(300, 32\) in the adapter but \(5,"
    ):
        check_base(adapter, model)
    del model.lm_head
    with pytest.raises(ValueError, match=r"has no parameter 'lm_head\.weight' that the adapter"):
        check_base(adapter, model)
