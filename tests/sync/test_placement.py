"""R7: a server that joins and splits as vLLM does; its ranks hold their parts of the merge."""

import pytest
import torch

from pacatune.sync import ColumnReceiver, ColumnSource
from tests.conftest import build_model
from tests.releases import needs
from tests.sync.conftest import adapt, assert_bits, bring, clone, merged, step
from tests.sync.ranks import experts_held_by, held_by
from tests.tuner import moe

# The vocabulary is no multiple of 64.
SIZES = {"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 4, "intermediate_size": 64}
Q_AND_V, SOME = ["q_proj", "v_proj"], ["k_proj", "up_proj", "down_proj", "lm_head"]


def build(**sizes):
    return build_model(100, **{**SIZES, **sizes})


@pytest.mark.parametrize(
    ("size", "targets"),
    [
        *((size, "all-linear") for size in (1, 2, 4, 8)),
        *((size, Q_AND_V) for size in (2, 4)),
        *((size, SOME) for size in (1, 4, 8)),
    ],
    ids=str,
)
def test_ranks_of_vllm(size, targets):
    """With 4 and 8 ranks several hold the same heads of keys and values."""
    model = adapt(base=build(), r=5, target_modules=targets)
    source, base = ColumnSource(model), build().state_dict()
    ranks = [held_by(base, rank, size) for rank in range(size)]
    receivers = [
        ColumnReceiver(tensors, tp_rank=rank, tp_size=size) for rank, tensors in enumerate(ranks)
    ]
    for seed in range(2):
        step(model, seed=seed)
        columns = source.columns()
        for receiver in receivers:
            receiver.apply(columns)
    expected = merged(model)
    for rank, tensors in enumerate(ranks):
        assert_bits(tensors, held_by(expected, rank, size))
        receivers[rank].revert()
        assert_bits(tensors, held_by(base, rank, size))


FUSIONS = {"qkv_proj": ("query", "q_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


@pytest.mark.parametrize(
    ("sizes", "rank_and_size", "options", "message"),
    [
        ({}, (0, 2), {"tp_size": 4}, r"part of rank 0 of 4; serve the same base, and give"),
        (
            {"intermediate_size": 96},
            (1, 2),
            {"tp_rank": 1, "tp_size": 2},
            r"rows of gate_proj, up_proj, .* '.*gate_up_proj.* part of rank 1 of 2",
        ),
        ({}, (0, 1), {"fusions": FUSIONS}, r"no 'model.layers.0.self_attn.query.weight'; the near"),
    ],
)
def test_a_wrong_rank_or_another_model_is_refused(sizes, rank_and_size, options, message):
    columns = ColumnSource(adapt(base=build())).columns()
    tensors = held_by(build(**sizes).state_dict(), *rank_and_size)
    with pytest.raises(ValueError, match=message):
        ColumnReceiver(tensors, **options).apply(columns)


def test_rows_that_another_server_joins():
    model = adapt(base=build(), target_modules=["up_proj", "down_proj"], init_weights=False)

    def joined(tensors):
        name = "model.layers.1.mlp.{}_proj.weight"
        return {name.format("w"): torch.cat([tensors[name.format(one)] for one in ("up", "gate")])}

    tensors, fusions = joined(build().state_dict()), {"w_proj": ("up_proj", "gate_proj")}
    bring(ColumnSource(model), ColumnReceiver(tensors, fusions=fusions, is_partial=True))
    assert_bits(tensors, joined(merged(model)))


@needs("transformers", "5")
@pytest.mark.parametrize("size", [1, 2])
def test_experts_of_vllm(size):
    base = moe.build("qwen3", dtype=torch.float32)
    plain = clone(base)
    options = {"r": 3, "target_modules": [], "target_parameters": moe.BOTH, "init_weights": False}
    model = adapt(base=base, **options)
    source, expected = ColumnSource(model), merged(model)
    for rank in range(size):
        tensors = experts_held_by(plain, rank, size)
        bring(source, ColumnReceiver(tensors, tp_rank=rank, tp_size=size))
        assert_bits(tensors, experts_held_by(expected, rank, size))
