"""Adapters on MultiheadAttention among everything else that is done to models."""

import copy

import pytest
import torch
from peft import PeftModel, get_peft_model_state_dict
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from pacatune import PacaConfig
from tests.releases import compiles_whole, needs
from tests.tuner.attention_nets import (
    BATCH,
    BOTH,
    EMBED_DIM,
    LENGTH,
    NUM_HEADS,
    Reference,
    adapt,
    assert_equal,
    build,
    inputs,
)
from tests.tuner.moe import fill, layers


def test_only_trained_columns_are_kept() -> None:
    base = build(batch_first=True).requires_grad_(False)
    sizes = []
    for model in (adapt(base), adapt(base).requires_grad_(False)):
        given = {p.untyped_storage().data_ptr() for p in model.parameters()}
        kept: dict[int, torch.Tensor] = {}

        def pack(tensor, kept=kept, given=given):
            if tensor.is_floating_point() and tensor.untyped_storage().data_ptr() not in given:
                kept[tensor.untyped_storage().data_ptr()] = tensor
            return tensor

        x = torch.randn(64, LENGTH, EMBED_DIM, dtype=torch.float64).requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model(x, x, x, need_weights=False)
        sizes.append(sum(tensor.untyped_storage().nbytes() for tensor in kept.values()))
    columns, update = 64 * LENGTH * 3 * 8, 3 * EMBED_DIM * 3 * 8
    # in_proj and out_proj each keep R channels of their input; in_proj a scaled copy of delta.
    assert sizes[0] - sizes[1] <= 2 * columns + update


@needs("peft", "0.21")  # `layers_pattern` at the start of a name
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.parametrize("targets", [BOTH, ["attn"], ["out_proj"], ["linear1"]])
@pytest.mark.parametrize("is_padded", [False, True])
def test_fused_inference_does_not_pass_by_the_adapter(targets, is_padded: bool) -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(
        EMBED_DIM, NUM_HEADS, 16, dropout=0.1, batch_first=True, dtype=torch.float64
    )
    base = nn.TransformerEncoder(layer, 2, enable_nested_tensor=True).eval()
    targets = [{"attn": "self_attn"}.get(name, name) for name in targets]
    model = adapt(base, target_modules=targets, layers_to_transform=[1], layers_pattern="layers")
    x = torch.randn(BATCH, LENGTH, EMBED_DIM, dtype=torch.float64)
    padding = torch.arange(LENGTH) >= torch.tensor([[5], [3], [4]]) if is_padded else None
    with_gradients = model.eval()(x, src_key_padding_mask=padding)
    with torch.no_grad():
        y = model(x, src_key_padding_mask=padding)
        plain = base(x, src_key_padding_mask=padding)
        merged = copy.deepcopy(model).merge_and_unload()
        want = merged(x, src_key_padding_mask=padding)
    valid = ~padding if is_padded else torch.ones(BATCH, LENGTH, dtype=torch.bool)
    torch.testing.assert_close(y[valid], with_gradients[valid])
    torch.testing.assert_close(y[valid], want[valid])
    assert not torch.allclose(y[valid], plain[valid], atol=1e-3)
    assert merged.use_nested_tensor is True
    assert merged.layers[1].activation_relu_or_gelu == base.layers[1].activation_relu_or_gelu


def test_merge_unmerge_disable_and_unload() -> None:
    base = build(batch_first=True)
    model = adapt(base)
    args = inputs(base, "cross")
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    y = model(*args)[0]
    for _ in range(3):
        model.merge_adapter(safe_merge=True)
        torch.testing.assert_close(model(*args)[0], y)
        model.unmerge_adapter()
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, state[name]), name
    with model.disable_adapter():
        # Of the same weights: another alignment of a copy's memory may change the last bit.
        assert torch.equal(model(*args)[0], model.get_base_model().attn.base_layer(*args)[0])
        torch.testing.assert_close(model(*args)[0], base(*args)[0], atol=1e-12, rtol=1e-12)
    merged = copy.deepcopy(model).merge_and_unload()
    assert [name for name, _ in merged.named_modules()] == [n for n, _ in base.named_modules()]
    assert list(merged.state_dict()) == list(base.state_dict())
    torch.testing.assert_close(merged(*args)[0], y)
    for name, tensor in model.unload().state_dict().items():
        assert torch.equal(tensor, base.state_dict()[name])


@pytest.mark.parametrize("targets", [BOTH, ["attn"], ["out_proj"]], ids=["both", "in", "out"])
def test_save_and_load(tmp_path, targets) -> None:
    base = build(batch_first=True)
    model = adapt(base, target_modules=targets, rank_pattern={targets[0]: 2})
    names = {name.rpartition(".paca_")[0] for name in get_peft_model_state_dict(model)}
    want = {"attn": "attn.in_proj_weight", "out_proj": "attn.out_proj"}
    assert names == {f"base_model.model.{want[name]}" for name in targets}
    ranks = {name: layer.r["default"] for name, layer in layers(model).items()}
    assert ranks == {want[name]: 2 if name == targets[0] else 3 for name in targets}
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path, autocast_adapter_dtype=False)
    args = inputs(base, "self")
    with torch.no_grad():
        assert torch.equal(loaded(*args)[0], model(*args)[0])


def test_several_adapters() -> None:
    base = build(batch_first=True)
    model = adapt(base, target_modules=["out_proj"])
    args = inputs(base, "self")
    y = model(*args)[0]
    model.add_adapter("other", PacaConfig(r=2, target_modules=BOTH, random_seed=4))
    fill(model, "other")
    assert torch.equal(model(*args)[0], y)
    model.set_adapter("other")
    reference = Reference(base, model, "other")
    torch.testing.assert_close(model(*args)[0], reference(*args)[0])
    assert len(reference.layers) == 2
    model.base_model.set_adapter(["default", "other"])
    torch.testing.assert_close(model(*args)[0], copy.deepcopy(model).merge_and_unload()(*args)[0])
    model.add_weighted_adapter(["default", "other"], [1.0, 1.0], "sum")
    model.set_adapter("sum")
    torch.testing.assert_close(model(*args)[0], copy.deepcopy(model).merge_and_unload()(*args)[0])
    model.set_adapter("default")
    model.delete_adapter("other")
    model.delete_adapter("sum")
    assert torch.equal(model(*args)[0], y)
    with pytest.raises(ValueError, match=r"adapted torch.nn.MultiheadAttention"):
        model.eval()(*args, adapter_names=["default"] * BATCH)


def test_all_linear_reaches_the_output_projection() -> None:
    base = build(batch_first=True)
    model = adapt(base, target_modules="all-linear")
    assert list(layers(model)) == ["attn.out_proj"]
    args = inputs(base, "self")
    assert_equal(model, Reference(base, model), args, {})


def test_hooks_and_offloading_run() -> None:
    from accelerate import cpu_offload

    base = build(batch_first=True)
    model = adapt(base)
    args = inputs(base, "self")
    y = model(*args)[0]
    seen = []
    handle = model.get_base_model().attn.base_layer.register_forward_hook(
        lambda module, inputs, output: seen.append(output[0])
    )
    assert torch.equal(model(*args)[0], y)
    assert len(seen) == 1
    handle.remove()
    model = cpu_offload(model, execution_device=torch.device("cpu"))
    assert model.get_base_model().attn.base_layer.in_proj_weight.is_meta
    torch.testing.assert_close(model(*args)[0], y)


# Dynamo itself instantiates autograd Functions while it traces them.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@compiles_whole
def test_compiles_in_one_graph() -> None:
    torch._dynamo.reset()
    base = build(batch_first=True)
    model, twin = adapt(base), adapt(base)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for which, forward in ((model, compiled), (twin, twin)):
        optimizer = torch.optim.SGD([p for p in which.parameters() if p.requires_grad], lr=0.1)
        for seed in range(3):
            x = torch.randn(
                BATCH,
                LENGTH,
                EMBED_DIM,
                dtype=torch.float64,
                generator=torch.Generator().manual_seed(seed),
            )
            forward(x, x, x)[0].square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)
    assert counter.frame_count == 1


def test_different_dimensions_are_refused() -> None:
    with pytest.raises(
        ValueError, match=r"'attn' has kdim=8 and vdim=12; both must be embed_dim=12"
    ):
        adapt(build(kdim=8))


def test_copies_are_independent() -> None:
    base = build(batch_first=True)
    model = adapt(base)
    args = inputs(base, "self")
    y = model(*args)[0]
    twin = copy.deepcopy(model)
    for layer in layers(twin).values():
        layer.delta_of("default").data.zero_()
    torch.testing.assert_close(twin(*args)[0], base(*args)[0])
    assert torch.equal(model(*args)[0], y)
