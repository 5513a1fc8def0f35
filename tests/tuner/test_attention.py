"""The adapted nn.MultiheadAttention: torch's own with adapted weights, whatever it is asked (R1).

test_every_kind.py holds what PEFT does with its `in_proj_weight`.
"""

import copy

import pytest
import torch
from peft import PeftModel, get_peft_model_state_dict
from torch import nn

from pacatune import PacaConfig
from tests.ops.twin import bytes_kept
from tests.releases import needs
from tests.tuner import nets
from tests.tuner.nets import Reference, assert_equal, check_second_adapter, evaluate, layers

EMBED_DIM, NUM_HEADS, LENGTH, KEYS, BATCH = 12, 4, 5, 7, 3
BOTH = ["attn", "out_proj"]
MASKS = ["attn_mask", "key_padding_mask"]


class Net(nn.Module):
    def __init__(self, **options) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(EMBED_DIM, NUM_HEADS, dtype=torch.float64, **options)

    def forward(self, *args, **kwargs):
        return self.attn(*args, **kwargs)


def build(**options) -> Net:
    torch.manual_seed(0)
    net = Net(**options)
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.4)
    return net


def adapt(base: nn.Module, targets=BOTH, **options) -> nn.Module:
    return nets.adapt(base, target_modules=targets, **options)


def inputs(base: Net, kind: str, is_batched: bool = True) -> tuple[torch.Tensor, ...]:
    """Query, key and value of self-attention, of cross-attention, or three different tensors."""
    generator = torch.Generator().manual_seed(1)

    def normal(length: int) -> torch.Tensor:
        shape = (length, EMBED_DIM)
        if is_batched:
            shape = (BATCH, *shape) if base.attn.batch_first else (length, BATCH, EMBED_DIM)
        return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()

    query = normal(LENGTH)
    if kind == "self":
        return query, query, query
    key = normal(KEYS)
    return query, key, key if kind == "cross" else normal(KEYS)


@pytest.mark.parametrize(
    ("kind", "targets", "groups", "options", "need_weights"),
    [
        ("self", BOTH, 1, {}, True),
        ("self", ["attn"], 1, {"bias": False, "batch_first": True}, False),
        ("self", "all-linear", 1, {"batch_first": True}, True),
        ("cross", BOTH, 2, {"bias": False, "batch_first": True}, True),
        ("cross", ["out_proj"], 1, {}, False),
        ("three", BOTH, 1, {"batch_first": True}, False),
        ("three", ["attn"], 2, {"bias": False}, True),
    ],
)
def test_equal_to_reference(
    kind: str, targets, groups: int, options: dict, need_weights: bool
) -> None:
    base = build(**options)
    model = adapt(base, targets, groups=groups)
    reference = Reference(base, model)
    assert_equal(model, reference, *inputs(base, kind), need_weights=need_weights)


def masks(kind: str, num_dims: int, is_batched: bool) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    batch = (BATCH if is_batched else 1) * NUM_HEADS
    shape = (LENGTH, KEYS) if num_dims == 2 else (batch, LENGTH, KEYS)
    attention = torch.rand(shape, generator=generator) < 0.3
    padding = torch.arange(KEYS) >= torch.tensor([[KEYS], [4], [5]])
    padding = padding if is_batched else padding[1]
    attention[..., 0] = False
    if kind == "float":
        attention = torch.zeros(shape, dtype=torch.float64).masked_fill(attention, -torch.inf)
        attention = attention + torch.randn(shape, generator=generator, dtype=torch.float64)
        padding = torch.zeros(padding.shape, dtype=torch.float64).masked_fill(padding, -torch.inf)
    return dict(zip(MASKS, (attention, padding), strict=True))


BIAS_KV, ZERO = {"add_bias_kv": True}, {"add_zero_attn": True}


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize(
    ("options", "kind", "num_dims", "names", "is_batched"),
    [
        ({}, "bool", 2, MASKS, True),
        ({}, "bool", 3, MASKS[:1], True),
        ({}, "bool", 2, MASKS[1:], True),
        ({"batch_first": True}, "float", 3, MASKS, True),
        ({}, "float", 2, MASKS[:1], False),
        ({}, "bool", 3, MASKS, False),
        (BIAS_KV, "bool", 2, MASKS, True),
        (ZERO, "float", 3, MASKS, True),
        (BIAS_KV | ZERO, "bool", 2, MASKS, True),
        (BIAS_KV | ZERO, "bool", 2, [], True),
    ],
)
def test_masks_and_appended_keys(
    options: dict, kind: str, num_dims: int, names: list[str], is_batched: bool, need_weights: bool
) -> None:
    base = build(**options)
    model = adapt(base)
    given = masks(kind, num_dims, is_batched)
    kwargs = {"need_weights": need_weights, **{name: given[name] for name in names}}
    assert_equal(model, Reference(base, model), *inputs(base, "cross", is_batched), **kwargs)


@pytest.mark.parametrize(
    "options",
    [
        {"need_weights": False},
        {"need_weights": False, "key_padding_mask": torch.arange(LENGTH).expand(BATCH, -1) > 3},
        {"average_attn_weights": True},
        {"average_attn_weights": False},
    ],
)
def test_causal(options: dict) -> None:
    base = build(batch_first=True)
    model = adapt(base)
    mask = nn.Transformer.generate_square_subsequent_mask(LENGTH, dtype=torch.float64)
    if "key_padding_mask" in options:
        mask = mask.isinf()  # torch wants masks of one kind
    kwargs = {"attn_mask": mask, "is_causal": True, **options}
    assert_equal(model, Reference(base, model), *inputs(base, "self"), **kwargs)


@pytest.mark.parametrize("need_weights", [True, False])
def test_dropout_draws_the_same_numbers(need_weights: bool) -> None:
    base = build(batch_first=True, dropout=0.3)
    model, args = adapt(base).train(), inputs(base, "self")
    assert_equal(model, Reference(base, model).train(), *args, need_weights=need_weights, seed=3)
    assert not torch.equal(model(*args)[0], model(*args)[0])
    model.eval()
    assert torch.equal(model(*args)[0], model(*args)[0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"attn_mask": torch.zeros(1, 5)}, r"here \(5, 5\) or \(12, 5, 5\), got shape \(1, 5\)"),
        ({"attn_mask": torch.zeros(5, 5).long()}, "must be bool or floating, got torch.int64"),
        ({"is_causal": True}, "Need attn_mask if specifying the is_causal hint"),
    ],
)
def test_wrong_masks(options: dict, message: str) -> None:
    base = build(batch_first=True)
    with pytest.raises(RuntimeError, match=message):
        adapt(base)(*inputs(base, "self"), **options)


def test_only_trained_columns_are_kept() -> None:
    base = build(batch_first=True).requires_grad_(False)
    x = torch.randn(64, LENGTH, EMBED_DIM, dtype=torch.float64).requires_grad_()
    trained, frozen = (
        bytes_kept(lambda m=m: m(x, x, x, need_weights=False), [*m.parameters(), *m.buffers()])
        for m in (adapt(base), adapt(base).requires_grad_(False))
    )
    columns, update = 64 * LENGTH * 3 * 8, 3 * EMBED_DIM * 3 * 8
    # in_proj and out_proj each keep R channels of their input; in_proj a scaled copy of delta.
    assert trained - frozen <= 2 * columns + update


@needs("peft", "0.21")  # `layers_pattern` at the start of a name
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.parametrize(
    ("targets", "is_padded"),
    [
        (["self_attn", "out_proj"], True),
        (["self_attn"], False),
        (["out_proj"], True),
        (["linear1"], False),
    ],
)
def test_fused_inference_does_not_pass_by_the_adapter(targets, is_padded: bool) -> None:
    torch.manual_seed(0)
    options = {"batch_first": True, "dtype": torch.float64}
    layer = nn.TransformerEncoderLayer(EMBED_DIM, NUM_HEADS, 16, **options)
    base = nn.TransformerEncoder(layer, 2, enable_nested_tensor=True).eval()
    model = adapt(base, targets, layers_to_transform=[1], layers_pattern="layers").eval()
    x = torch.randn(BATCH, LENGTH, EMBED_DIM, dtype=torch.float64)
    padding = torch.arange(LENGTH) >= torch.tensor([[5], [3], [4]]) if is_padded else None
    with_gradients = model(x, src_key_padding_mask=padding)
    with torch.no_grad():
        merged = copy.deepcopy(model).merge_and_unload()
        y, plain, want = (m(x, src_key_padding_mask=padding) for m in (model, base, merged))
    valid = ~padding if is_padded else torch.ones(BATCH, LENGTH, dtype=torch.bool)
    torch.testing.assert_close(y[valid], with_gradients[valid])
    torch.testing.assert_close(y[valid], want[valid])
    assert not torch.allclose(y[valid], plain[valid], atol=1e-3)
    assert merged.use_nested_tensor is True
    assert merged.layers[1].activation_relu_or_gelu == base.layers[1].activation_relu_or_gelu


@pytest.mark.parametrize(
    ("targets", "ranks"),
    [
        (BOTH, {"attn.in_proj_weight": 2, "attn.out_proj": 3}),
        (["attn"], {"attn.in_proj_weight": 2}),
        (["out_proj"], {"attn.out_proj": 2}),
        ("all-linear", {"attn.out_proj": 2}),
    ],
)
def test_names_and_ranks_in_files(tmp_path, targets, ranks: dict[str, int]) -> None:
    base = build(batch_first=True)
    first = "out_proj" if targets == "all-linear" else targets[0]
    model = adapt(base, targets, rank_pattern={first: 2})
    names = {name.rpartition(".paca_")[0] for name in get_peft_model_state_dict(model)}
    assert names == {f"base_model.model.{name}" for name in ranks}
    assert {name: layer.r["default"] for name, layer in layers(model).items()} == ranks
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path, autocast_adapter_dtype=False)
    args = inputs(base, "self")
    assert torch.equal(evaluate(loaded, *args)[0], evaluate(model, *args)[0])


def test_a_second_adapter_has_parts_that_the_first_has_not() -> None:
    base = build(batch_first=True)
    model, args = adapt(base, ["out_proj"]), inputs(base, "self")
    check_second_adapter(
        model,
        PacaConfig(r=2, target_modules=BOTH, random_seed=4),
        lambda model: evaluate(model, *args)[0],
        lambda *names: assert_equal(model, Reference(base, model, *names), *args),
    )
