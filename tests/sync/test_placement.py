"""A server that joins and splits as vLLM does: ranks hold their parts of the merged model."""

import pytest
import torch
from torch import nn

from pacatune.sync import ColumnReceiver, ColumnSource
from tests.conftest import build_model
from tests.releases import needs
from tests.sync.conftest import assert_bits, step

SIZES = {"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 4, "intermediate_size": 64}
VOCABULARY = 100


def adapt(**options):
    from peft import get_peft_model

    from pacatune import PacaConfig

    options = {"r": 5, "paca_alpha": 8, "target_modules": "all-linear", **options}
    return get_peft_model(build_model(VOCABULARY, **SIZES), PacaConfig(**options))


def kept_by_rank(tensors, rank, size):
    """What vLLM's rank holds of a checkpoint, joined and split as its loaders do."""
    num_kv = max(1, SIZES["num_key_value_heads"] // size)
    kv_rank = rank // max(1, size // SIZES["num_key_value_heads"])
    held = {}
    for name, tensor in tensors.items():
        owner, _, last = name.rpartition(".")
        owner, _, module = owner.rpartition(".")
        if module == "q_proj":
            parts = [
                tensor.chunk(size)[rank],
                *(
                    tensors[f"{owner}.{one}_proj.{last}"].narrow(
                        0, kv_rank * num_kv * 4, num_kv * 4
                    )
                    for one in "kv"
                ),
            ]
            held[f"{owner}.qkv_proj.{last}"] = torch.cat(parts)
        elif module == "gate_proj":
            up = tensors[f"{owner}.up_proj.{last}"].chunk(size)[rank]
            held[f"{owner}.gate_up_proj.{last}"] = torch.cat((tensor.chunk(size)[rank], up))
        elif module in ("o_proj", "down_proj"):
            held[name] = tensor.chunk(size, 1)[rank].contiguous()
        elif module in ("embed_tokens", "lm_head"):
            padded = nn.functional.pad(tensor, (0, 0, 0, 128 - VOCABULARY))
            held[name] = padded.chunk(size)[rank].contiguous()
        elif module not in ("k_proj", "v_proj", "up_proj"):
            held[name] = tensor.clone()
    return held


@pytest.mark.parametrize(
    "targets",
    ["all-linear", ["q_proj", "v_proj"], ["k_proj", "up_proj", "down_proj", "lm_head"]],
    ids=str,
)
@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_ranks_of_vllm(size, targets, groups):
    """With 4 and 8 ranks several hold the same heads of keys and values."""
    model = adapt(target_modules=targets, groups=groups)
    source = ColumnSource(model)
    base = build_model(VOCABULARY, **SIZES).state_dict()
    ranks = [kept_by_rank(base, rank, size) for rank in range(size)]
    receivers = [
        ColumnReceiver(tensors, tp_rank=rank, tp_size=size) for rank, tensors in enumerate(ranks)
    ]
    for seed in range(2):
        step(model, seed=seed)
        columns = source.columns()
        for receiver in receivers:
            receiver.expect(source.positions())
            receiver.apply(columns)
    model.merge_adapter()
    merged = {
        name.replace(".base_layer", ""): tensor
        for name, tensor in model.get_base_model().state_dict().items()
        if "paca_" not in name
    }
    for rank, tensors in enumerate(ranks):
        assert_bits(tensors, kept_by_rank(merged, rank, size))
        receivers[rank].revert()
        assert_bits(tensors, kept_by_rank(base, rank, size))
    assert receivers[0].num_bytes == 0


def test_a_wrong_rank_or_another_model_is_refused():
    positions = ColumnSource(adapt()).positions()
    base = build_model(VOCABULARY, **SIZES).state_dict()
    with pytest.raises(ValueError, match=r"part of rank 0 of 4; serve the same base, and give"):
        ColumnReceiver(kept_by_rank(base, 0, 2), tp_size=4).expect(positions)
    other = build_model(VOCABULARY, **{**SIZES, "intermediate_size": 96}).state_dict()
    with pytest.raises(
        ValueError, match=r"gate_up_proj.* part of rank 1 of 2 of gate_proj, up_proj"
    ):
        ColumnReceiver(kept_by_rank(other, 1, 2), tp_rank=1, tp_size=2).expect(positions)
    fusions = {"qkv_proj": ("query", "q_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
    with pytest.raises(
        ValueError, match=r"no 'model.layers.0.self_attn.query.weight'; the nearest"
    ):
        ColumnReceiver(kept_by_rank(base, 0, 1), fusions=fusions).expect(positions)


def test_rows_that_another_server_joins():
    model = adapt(target_modules=["up_proj", "down_proj"], init_weights=False)
    source = ColumnSource(model)
    name = "model.layers.1.mlp.{}_proj.weight"
    base = build_model(VOCABULARY, **SIZES).state_dict()
    tensors = {name.format("w"): torch.cat([base[name.format(one)] for one in ("up", "gate")])}
    receiver = ColumnReceiver(
        tensors, fusions={"w_proj": ("up_proj", "gate_proj")}, is_partial=True
    )
    receiver.expect(source.positions())
    receiver.apply(source.columns())
    merged = model.merge_and_unload().state_dict()
    expected = torch.cat([merged[name.format(one)] for one in ("up", "gate")])
    assert_bits(tensors, {name.format("w"): expected})


def experts_of_rank(tensors, rank, size):
    held = {}
    for name, tensor in tensors.items():
        if name.endswith("experts.gate_up_proj"):
            halves = [half.chunk(size, 1)[rank] for half in tensor.chunk(2, 1)]
            held[name.replace("gate_up_proj", "w13_weight")] = torch.cat(halves, 1)
        elif name.endswith("experts.down_proj"):
            held[name.replace("down_proj", "w2_weight")] = tensor.chunk(size, 2)[rank].contiguous()
    return held


@needs("transformers", "5")
@pytest.mark.parametrize("size", [1, 2])
def test_experts_of_vllm(size):
    from peft import get_peft_model
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    from pacatune import PacaConfig

    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        hidden_size=16,
        moe_intermediate_size=8,
        num_experts=4,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        vocab_size=32,
    )
    base = Qwen3MoeForCausalLM(config)
    plain = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    parameters = ["experts.gate_up_proj", "experts.down_proj"]
    paca = PacaConfig(
        r=3, init_weights=False, target_modules=[], target_parameters=parameters, random_seed=1
    )
    model = get_peft_model(base, paca)
    source = ColumnSource(model)
    columns = source.columns()
    model.merge_adapter()
    merged = {
        name.replace(".base_layer", ""): tensor
        for name, tensor in model.get_base_model().state_dict().items()
        if "paca_" not in name
    }
    for rank in range(size):
        tensors = experts_of_rank(plain, rank, size)
        receiver = ColumnReceiver(tensors, tp_rank=rank, tp_size=size)
        receiver.expect(source.positions())
        receiver.apply(columns)
        assert_bits(tensors, experts_of_rank(merged, rank, size))
