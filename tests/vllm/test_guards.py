"""What the engine refuses, without a started vLLM."""

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from pacatune.sync import ColumnSet, Positions


def refuse(model, name, size=1):
    from pacatune.integrations.vllm_engine import refuse_unreachable

    indices = torch.tensor([1, 3])
    one = ColumnSet.at(
        name=name, parameter=name, dim=1, shape=(8, 8), dtype=torch.float32, indices=indices
    )
    refuse_unreachable(model, Positions(sets=(one,), shapes={}, run="run"), size)


@pytest.fixture
def model():
    found = nn.Module()
    for name in ("embed_tokens", "lm_head", "qkv_proj", "kv_b_proj"):
        found.add_module(name, nn.Linear(8, 8, bias=False))
    return found


def test_weights_of_latent_attention(model):
    with pytest.raises(ValueError, match=r"kv_b_proj\.weight'.*products"):
        refuse(model, "kv_b_proj.weight")


def test_weights_that_vllm_ties(model):
    """By the checkpoint's names, too."""
    from vllm.model_executor.models.utils import WeightsMapper

    refuse(model, "embed_tokens.weight")
    model.lm_head.weight = model.embed_tokens.weight
    with pytest.raises(ValueError, match=r"one tensor for embed_tokens\.weight and lm_head"):
        refuse(model, "embed_tokens.weight")
    model.hf_to_vllm_mapper = WeightsMapper(orig_to_new_prefix={"model.text.": ""})
    with pytest.raises(ValueError, match="one tensor"):
        refuse(model, "model.text.embed_tokens.weight")


def test_weights_that_the_checkpoint_joins(model):
    model.packed_modules_mapping = {"qkv_proj": ["qkv_proj"]}
    refuse(model, "qkv_proj.weight")
    with pytest.raises(ValueError, match="tensor_parallel_size=1"):
        refuse(model, "qkv_proj.weight", size=2)


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


MOVED = """
import importlib
import sys
from types import ModuleType

old, new = "vllm.distributed.weight_transfer", "vllm.backends.distributed.weight_transfer"
for name in ("vllm.backends", "vllm.backends.distributed"):
    sys.modules[name] = ModuleType(name)
for part in ("", ".base", ".factory", ".sparse_nccl_engine"):
    sys.modules[new + part] = importlib.import_module(old + part)
for name in [name for name in sys.modules if name.startswith(old)]:
    sys.modules[name] = None  # as if it were not there

from pacatune.integrations.vllm import register

register()
factory = sys.modules[new].WeightTransferEngineFactory
engine = factory._registry["pacatune"]()
assert issubclass(engine, sys.modules[new + ".base"].WeightTransferEngine)
"""


def test_registered_where_vllm_has_moved_its_module():
    """Its main branch has `weight_transfer` in `backends`."""
    subprocess.run([sys.executable, "-c", MOVED], check=True)
