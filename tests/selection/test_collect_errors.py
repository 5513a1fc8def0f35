"""What cannot be collected is said."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from pacatune import PacaConfig
from pacatune.selection import collect_statistics
from tests.conftest import build_model
from tests.selection.nets import build, loss_of, make_batches
from tests.selection.test_collect import collect, config_of


def test_nothing_to_collect():
    with pytest.raises(ValueError, match=r"`selection` \('random'\) and .* need no statistics"):
        collect(build(), selection="random")


def test_models_that_cannot_be_observed():
    from peft import get_peft_model

    model = build()
    adapted = get_peft_model(copy.deepcopy(model), config_of("random"))
    with pytest.raises(ValueError, match=r"`model` is adapted \('.*attention.*'\); collect from"):
        collect(adapted)
    with pytest.raises(ValueError, match=r"`model` is on the meta device or sharded \('.*'\);"):
        collect(copy.deepcopy(model).to("meta"))
    wrapped = DistributedDataParallel.__new__(DistributedDataParallel)
    nn.Module.__init__(wrapped)
    with pytest.raises(ValueError, match="wrapped by DistributedDataParallel; collect from"):
        collect(wrapped)


def test_targets_without_activations():
    with pytest.raises(ValueError, match="target 'embed' is an embedding, whose input has no col"):
        collect(build(), normalize="input", targets=["embed", "up"])


def test_batches_and_losses_that_are_none():
    model = build()
    with pytest.raises(ValueError, match=r"`num_batches` \(0\) must be at least 1"):
        collect(model, [])
    config = config_of(targets=["up"])
    with pytest.raises(TypeError, match="a batch is a tuple; it must be a dictionary"):
        collect_statistics(model, make_batches(1), config)
    with pytest.raises(ValueError, match=r"loss of batch 0 \(\(16, 12\)\) must be one number"):
        collect_statistics(model, [1], config, loss_fn=lambda model, batch: model.up.weight)
    with pytest.raises(ValueError, match=r"loss of batch 0 \(\(\)\) must be one number that"):
        collect_statistics(model, [1], config, loss_fn=lambda model, batch: torch.zeros(()))
    ids = torch.ones(1, 4, dtype=torch.long)
    llama = PacaConfig(selection="gradient", target_modules=["q_proj"])
    with pytest.raises(ValueError, match=r"the loss of batch 0 \(None\) must be .* add `labels`"):
        collect_statistics(build_model(64), [{"input_ids": ids}], llama)
    batch = {"input_ids": ids, "labels": torch.full_like(ids, -100)}
    with pytest.raises(
        ValueError, match=r"2 targets have no gradient in .*or no batch has a label"
    ):
        collect_statistics(build_model(64), [batch], llama)
    with pytest.raises(ValueError, match=r"'up' have 'gradient'.* of a batch is not finite"):
        collect_statistics(
            model,
            make_batches(1),
            config,
            loss_fn=lambda model, batch: loss_of(model, batch) * torch.nan,
        )


def test_targets_that_are_never_used():
    model = build()
    model.unused = nn.Linear(4, 4).double()
    with pytest.raises(ValueError, match="1 targets have no gradient in 4 batches, first 'unused'"):
        collect(model, targets=["up", "unused"])
