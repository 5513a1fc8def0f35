"""Adapters put onto their base: what runs is what the file holds, or it is refused."""

import shutil

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from pacatune import PacaConfig, pretrained
from pacatune.adapters.base import load_base
from pacatune.adapters.export import export_lora
from pacatune.adapters.folder import open_adapter, read_adapter
from pacatune.adapters.loading import attach, load_language_model
from pacatune.adapters.merge import merge
from tests.adapters.fixtures import edit_json, edit_tensors, logits_of, save_adapter
from tests.releases import needs

CONFIG = "adapter_config.json"


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (
            ["q_proj", "v_proj", "down_proj", "k_proj"],
            r"k_proj' is adapted by its configuration only \(2",
        ),
        (["q_proj", "v_proj"], "down_proj.paca_.*but this model has no such adapted"),
    ],
)
def test_file_and_configuration_adapt_the_same_modules(adapter_copy, model, targets, message):
    edit_json(adapter_copy / CONFIG, target_modules=targets)
    with pytest.raises(ValueError, match=message):
        attach(model, read_adapter(adapter_copy))


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
    edit_tensors(folder, lambda tensors: [tensors.pop(n) for n in [*tensors] if "v_proj" in n])
    with pytest.raises(ValueError, match=r"PEFT cannot load the adapter .*missing adapter keys"):
        attach(model, open_adapter(folder))


# Language models, perhaps on a quantised base.


@needs("bitsandbytes")
def test_a_lora_adapter_on_a_quantised_base(tiny_model_dir, lora_dir):
    """It is neither the quantised base nor the adapter on the plain one."""
    ways = [(None, lora_dir, "nf4"), (str(tiny_model_dir), None, "nf4"), (None, lora_dir, None)]
    found, *others = (
        logits_of(load_language_model(m, a, quantization=q).model) for m, a, q in ways
    )
    assert not any(torch.allclose(found, other, atol=1e-4) for other in others)


@needs("bitsandbytes")
def test_paca_adapter_knows_its_quantised_base(tiny_model_dir, tmp_path):
    nf4 = {"method": "bitsandbytes", "type": "nf4", "block_size": 64, "double": True}
    save_adapter(tiny_model_dir, tmp_path, quantization=nf4)
    load_language_model(None, tmp_path, quantization="nf4")
    with pytest.raises(ValueError, match=r"`quantization` \('int8'\) is not the one .* \('nf4'\)"):
        load_language_model(None, tmp_path, quantization="int8")
    quantised = load_language_model(str(tiny_model_dir), quantization="nf4")
    quantised.model.save_pretrained(tmp_path / "base")
    quantised.tokenizer.save_pretrained(tmp_path / "base")
    with pytest.raises(ValueError, match=r"`quantization` \('nf4'\): .* is saved quantised"):
        load_language_model(str(tmp_path / "base"), quantization="nf4")


def test_what_cannot_be_loaded(tiny_model_dir, monkeypatch):
    with pytest.raises(ValueError, match="`model` and `adapter` are both missing"):
        load_language_model(None)
    with pytest.raises(ValueError, match=r"`quantization` \('nf5'\) must be one of nf4, fp4, int8"):
        load_language_model(str(tiny_model_dir), quantization="nf5")
    monkeypatch.setattr(pretrained, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"needs bitsandbytes; pip install -e '.\[quant\]'"):
        load_language_model(str(tiny_model_dir), quantization="nf4")


# Weights of the base in an adapter's file: PEFT puts them over the base, whatever they are.

EMBEDDING = "model.embed_tokens.base_layer.weight"
ADAPTED = {"target_modules": ["embed_tokens", "lm_head", "q_proj"]}
saves_embeddings = pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning")


@pytest.fixture
def adapted(tiny_model_dir, tmp_path):
    """The folder of an adapter whose embedding and head are adapted, and the model."""
    return tmp_path / "adapter", save_adapter(tiny_model_dir, tmp_path / "adapter", **ADAPTED)


def add(folder, name, value):
    edit_tensors(folder, lambda tensors: tensors.update({f"base_model.model.{name}": value}))


@needs("peft", "0.21")  # older ones save it
@saves_embeddings
def test_the_frozen_weight_of_an_adapted_embedding_is_not_saved(adapted, tiny_model_dir):
    folder, model = adapted
    names = load_file(folder / "adapter_model.safetensors").keys()
    assert {name.rpartition(".")[2] for name in names} == {"paca_delta", "paca_indices"}
    base = load_base(str(tiny_model_dir), task_type="CAUSAL_LM")
    assert torch.equal(logits_of(PeftModel.from_pretrained(base, folder)), logits_of(model))


@saves_embeddings
@pytest.mark.filterwarnings("ignore:The new embeddings will be initialized")
def test_a_vocabulary_that_grew_is_saved(tiny_model_dir, tmp_path):
    def grown():
        base = load_base(str(tiny_model_dir), task_type="CAUSAL_LM")
        base.resize_token_embeddings(base.config.vocab_size + 8)
        return base

    config = PacaConfig(r=4, task_type="CAUSAL_LM", init_weights=False, **ADAPTED)
    model = get_peft_model(grown(), config)
    model.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match=r"base_layer.weight' .* where the vocabulary grew"):
        loaded = PeftModel.from_pretrained(grown(), tmp_path)
    assert torch.equal(logits_of(loaded), logits_of(model))


@saves_embeddings
@pytest.mark.parametrize(
    "name", [EMBEDDING, "model.norm.weight", "model.layers.0.mlp.up_proj.weight"]
)
def test_a_weight_of_the_base_that_nothing_trains(adapted, tiny_model_dir, tmp_path, name):
    """An equal one does nothing; others are refused, by PeftModel named."""
    folder, model = adapted
    base = load_base(str(tiny_model_dir), task_type="CAUSAL_LM")
    own = base.get_parameter(name.replace(".base_layer", "")).detach().clone()
    add(folder, name, own)
    assert torch.equal(logits_of(PeftModel.from_pretrained(base, folder)), logits_of(model))
    load_language_model(str(tiny_model_dir), folder)

    add(folder, name, own + 1)
    for use in (
        lambda: merge(None, folder, tmp_path / "out"),
        lambda: load_language_model(None, folder),
    ):
        with pytest.raises(ValueError, match=rf"{name}' .* nothing in its configuration trains"):
            use()
    base = load_base(str(tiny_model_dir), task_type="CAUSAL_LM")
    with pytest.warns(UserWarning, match=rf"{name}' takes the place of that weight of the base"):
        PeftModel.from_pretrained(base, folder)
    result = export_lora(None, folder, tmp_path / "lora")
    assert any("of the base that it does not train" in note for note in result.notes)
    assert not any(
        name in key for key in load_file(tmp_path / "lora" / "adapter_model.safetensors")
    )
