"""What the engine refuses, without a started vLLM."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from pacatune.sync import ColumnSet, Positions


def positions(name, shape=(8, 8)):
    one = ColumnSet(
        name=name,
        parameter=name,
        dim=1,
        shape=shape,
        dtype=torch.float32,
        indices=torch.tensor([1, 3]),
    )
    return Positions(sets=(one,), shapes={}, run="run")


@pytest.fixture
def model():
    found = nn.Module()
    for name in ("embed_tokens", "lm_head", "qkv_proj", "kv_b_proj"):
        found.add_module(name, nn.Linear(8, 8, bias=False))
    return found


def refuse(*args):
    from pacatune.integrations.vllm_engine import refuse_unreachable

    refuse_unreachable(*args)


def test_weights_of_latent_attention(model):
    with pytest.raises(ValueError, match=r"kv_b_proj\.weight'.*products"):
        refuse(model, positions("kv_b_proj.weight"), 1)


def test_weights_that_vllm_ties(model):
    refuse(model, positions("embed_tokens.weight"), 1)
    model.lm_head.weight = model.embed_tokens.weight
    with pytest.raises(ValueError, match=r"one tensor for embed_tokens\.weight and lm_head"):
        refuse(model, positions("embed_tokens.weight"), 1)


def test_weights_that_the_checkpoint_joins(model):
    model.packed_modules_mapping = {"qkv_proj": ["qkv_proj"]}
    refuse(model, positions("qkv_proj.weight"), 1)
    with pytest.raises(ValueError, match="tensor_parallel_size=1"):
        refuse(model, positions("qkv_proj.weight"), 2)


def test_names_are_vllms(model):
    from vllm.model_executor.models.utils import WeightsMapper

    model.hf_to_vllm_mapper = WeightsMapper(orig_to_new_prefix={"model.text.": ""})
    model.lm_head.weight = model.embed_tokens.weight
    with pytest.raises(ValueError, match="one tensor"):
        refuse(model, positions("model.text.embed_tokens.weight"), 1)


def test_lora_is_refused():
    from vllm.config import WeightTransferConfig

    from pacatune.integrations.vllm_engine import ColumnEngine

    config = SimpleNamespace(lora_config=object(), parallel_config=None, model_config=None)
    with pytest.raises(ValueError, match="enable_lora"):
        ColumnEngine(WeightTransferConfig(backend="pacatune"), config, torch.device("cpu"), None)


def test_registered_once():
    from vllm.distributed.weight_transfer import WeightTransferEngineFactory
    from vllm.plugins import load_plugins_by_group

    plugins = load_plugins_by_group("vllm.general_plugins")
    plugins["pacatune"]()
    plugins["pacatune"]()
    assert "pacatune" in WeightTransferEngineFactory._registry
