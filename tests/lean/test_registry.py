"""What lean models do to transformers' registry of attention functions."""

import gc

import pytest
import torch

from pacatune import lean
from pacatune.lean.attention import find_registry
from tests.lean.models import adapted, build, gradients


@pytest.fixture
def _no_other_models():
    gc.unfreeze()  # a model of an earlier test may be among what conftest.py has frozen
    gc.collect()
    assert find_registry()["sdpa"].__name__ == "sdpa_attention_forward"


@pytest.mark.usefixtures("_no_other_models")
def test_a_model_that_is_gone_leaves_the_registry():
    plain = find_registry()["sdpa"]
    model = build("Llama")
    lean.enable(model)
    assert find_registry()["sdpa"] is not plain
    del model
    gc.collect()
    assert find_registry()["sdpa"] is plain


@pytest.mark.usefixtures("_no_other_models")
def test_two_models_share_the_registry(batch):
    plain = find_registry()["sdpa"]
    models = [adapted(), adapted()]
    for model in models:
        lean.enable(model)
    assert find_registry()["sdpa"].plain is plain
    lean.disable(models[0])
    assert find_registry()["sdpa"].plain is plain
    lean.disable(models[1])
    lean.disable(models[1])
    assert find_registry()["sdpa"] is plain


@pytest.mark.usefixtures("_no_other_models")
def test_somebody_elses_attention_function_comes_back(batch):
    registry, plain = find_registry(), find_registry()["sdpa"]

    def other(*args, **kwargs):
        return plain(*args, **kwargs)

    registry["sdpa"] = other
    try:
        model = adapted()
        lean.enable(model)
        gradients(model, batch)
        lean.disable(model)
        assert registry["sdpa"] is other
    finally:
        del registry["sdpa"]


def test_a_mask_is_made_additive_once(batch):
    model = adapted(dtype=torch.bfloat16)
    lean.enable(model)
    shapes = []

    def pack(x):
        if x.dim() == 4 and x.shape[-2:] == (20, 20):
            shapes.append(x.untyped_storage().data_ptr())
        return x.detach()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        model(**batch)
    assert len(shapes) == 2
    assert len(set(shapes)) == 1
