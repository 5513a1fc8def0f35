"""The adapted nn.Embedding against torch's own with an adapted weight."""

import copy

import pytest
import torch
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn import functional as F

from pacatune import PacaConfig
from pacatune.ops.reference import adapted_weight
from tests.conftest import build_model
from tests.distributed.net import checkpoint
from tests.releases import compiles_whole
from tests.tuner.moe import fill, layers

V, D, R = 11, 8, 3


class Net(nn.Module):
    def __init__(self, **options) -> None:
        super().__init__()
        self.embed = nn.Embedding(V, D, **options)
        self.head = nn.Linear(D, 4)

    def forward(self, ids):
        return self.head(torch.tanh(self.embed(ids)))


def build(dtype=torch.float64, **options) -> Net:
    torch.manual_seed(0)
    return Net(**options).to(dtype)


def adapt(base: nn.Module, **options) -> nn.Module:
    options = {"target_modules": ["embed"], "r": R, "paca_alpha": 6, **options}
    model = get_peft_model(copy.deepcopy(base), PacaConfig(**options), autocast_adapter_dtype=False)
    fill(model)
    return model


def ids(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(V, shape, generator=torch.Generator().manual_seed(seed))


def reference(base: Net, model: nn.Module, tokens: torch.Tensor, adapter: str = "default"):
    """Output, and delta with its gradient, by plain autograd through a whole new weight."""
    layer = model.get_base_model().embed
    delta = layer.delta_of(adapter).detach().clone().requires_grad_()
    columns, scaling = layer.paca_indices[adapter], layer.scaling[adapter]
    weight = adapted_weight(base.embed.weight.detach(), delta, columns, scaling)
    y = torch.func.functional_call(base, {"embed.weight": weight}, (tokens,))
    y.square().sum().backward()
    return y.detach(), delta


@pytest.mark.parametrize("shape", [(), (5,), (2, 5), (2, 3, 4), (0,)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(
    "options", [{}, {"padding_idx": 2}, {"scale_grad_by_freq": True}], ids=["", "padding", "freq"]
)
def test_equal_to_reference(shape, dtype, options) -> None:
    base = build(dtype, **options)
    model = adapt(base)
    tokens = ids(*shape)
    y, delta = reference(base, model, tokens)
    found = model(tokens)
    found.square().sum().backward()
    torch.testing.assert_close(found, y)
    if "padding_idx" in options:  # autograd through the whole weight does the same
        assert not delta.grad[2].any()
    gradient = model.get_base_model().embed.delta_of("default").grad
    torch.testing.assert_close(gradient, delta.grad)
    unseen = torch.ones(V, dtype=torch.bool)
    unseen[tokens.flatten()] = False
    assert not gradient[unseen].any()


def test_sparse_gradient() -> None:
    base, tokens = build(sparse=True), ids(2, 3)
    model = adapt(base)
    dense = adapt(build())
    for which in (model, dense):
        which(tokens).square().sum().backward()
    gradient = model.get_base_model().embed.delta_of("default").grad
    assert gradient.is_sparse
    assert set(gradient.coalesce().indices().flatten().tolist()) == set(tokens.flatten().tolist())
    want = dense.get_base_model().embed.delta_of("default").grad
    torch.testing.assert_close(gradient.to_dense(), want)
    torch.optim.SparseAdam(
        [p for p in model.parameters() if p.requires_grad and p.grad is not None], lr=0.1
    ).step()


def test_nothing_but_ids_is_kept() -> None:
    base, tokens = build(), ids(2, 5)
    model = adapt(base)
    given = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = []

    def pack(tensor):
        if tensor.untyped_storage().data_ptr() not in given and tensor.is_floating_point():
            kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model.get_base_model().embed(tokens)
    assert not kept


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision(dtype) -> None:
    base = build(dtype)
    model = get_peft_model(copy.deepcopy(base), PacaConfig(r=R, target_modules=["embed"]))
    layer = model.get_base_model().embed
    assert layer.delta_of("default").dtype == torch.float32
    fill(model)
    y = layer(ids(50))
    assert y.dtype == dtype
    weight = base.embed.weight.double()[ids(50)]
    update = layer.get_delta_weight("default").double()[ids(50)]
    # One rounding of the update and one of the sum.
    assert (
        (y - weight - update).abs()
        <= torch.finfo(dtype).eps * (weight + update).abs().add(update.abs())
    ).all()


def test_merge_unmerge_and_unload() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        base = build(dtype)
        model = adapt(base)
        layer, before = model.get_base_model().embed, base.embed.weight
        for _ in range(3):
            model.merge_adapter(safe_merge=True)
            assert not torch.equal(layer.base_layer.weight, before)
            model.unmerge_adapter()
            assert torch.equal(layer.base_layer.weight, before)
        with model.disable_adapter():
            assert torch.equal(model(ids(5)), base(ids(5)))
        y = model(ids(5))
        merged = copy.deepcopy(model).merge_and_unload()
        assert type(merged.embed) is nn.Embedding
        torch.testing.assert_close(merged(ids(5)), y, atol=1e-2, rtol=1e-2)
        assert torch.equal(model.unload().embed.weight, before)


def test_training_equals_reference() -> None:
    base = build()
    model = adapt(base, init_weights=True)
    layer = model.get_base_model().embed
    with torch.no_grad():
        layer.delta_of("default").zero_()
    delta = torch.zeros(V, R, dtype=torch.float64, requires_grad=True)

    def plain(tokens):
        weight = adapted_weight(
            base.embed.weight.detach(), delta, layer.paca_indices["default"], 2.0
        )
        return torch.func.functional_call(base, {"embed.weight": weight}, (tokens,))

    losses = []
    for forward, parameter in ((model, layer.delta_of("default")), (plain, delta)):
        optimizer = torch.optim.AdamW([parameter], lr=0.05)
        losses.append([])
        for step in range(20):
            loss = (forward(ids(6, seed=step % 3)) - 1).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[-1].append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-10)
    assert losses[0][-1] < losses[0][2]
    assert torch.equal(layer.base_layer.weight, base.embed.weight)


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_save_and_load(tmp_path, low_cpu_mem_usage: bool) -> None:
    base = build()
    model = adapt(base, random_seed=9)
    tensors = get_peft_model_state_dict(model)
    assert tensors["base_model.model.embed.paca_delta"].shape == (V, R)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(
        copy.deepcopy(base),
        tmp_path,
        autocast_adapter_dtype=False,
        low_cpu_mem_usage=low_cpu_mem_usage,
    )
    assert torch.equal(loaded(ids(2, 5)), model(ids(2, 5)))


def test_several_adapters_and_mixed_batches() -> None:
    base = build()
    model = adapt(base).eval()
    model.add_adapter("other", PacaConfig(r=2, target_modules=["embed"], random_seed=4))
    fill(model, "other")
    tokens, outputs = ids(3, 5), {}
    for name in ("default", "other"):
        model.set_adapter(name)
        outputs[name], _ = reference(base, model, tokens, name)
        torch.testing.assert_close(model(tokens), outputs[name])
    y = model(tokens, adapter_names=["other", "__base__", "default"])
    want = torch.stack([outputs["other"][0], base(tokens)[1], outputs["default"][2]])
    torch.testing.assert_close(y, want)
    model.add_weighted_adapter(["default", "other"], [0.5, 2.0], "sum")
    layer = model.get_base_model().embed
    want = 0.5 * layer.get_delta_weight("default") + 2 * layer.get_delta_weight("other")
    torch.testing.assert_close(layer.get_delta_weight("sum"), want)


@pytest.mark.filterwarnings("ignore:Model (has|with) `tie_word_embeddings=True`:UserWarning")
def test_tied_head_stays_as_it_is() -> None:
    base = build_model(V, tie_word_embeddings=True)
    model = get_peft_model(copy.deepcopy(base), PacaConfig(r=R, target_modules=["embed_tokens"]))
    fill(model)
    head = model.get_base_model().lm_head
    tokens = ids(2, 5)
    weight = base.lm_head.weight + layers(model)["model.embed_tokens"].get_delta_weight("default")
    want = torch.func.functional_call(
        base, {"model.embed_tokens.weight": weight}, (tokens,), tie_weights=False
    )
    torch.testing.assert_close(model(tokens).logits, want.logits)
    model.merge_adapter()
    assert torch.equal(head.weight, base.lm_head.weight)
    torch.testing.assert_close(model(tokens).logits, want.logits)
    model.unmerge_adapter()
    assert model.get_base_model().model.embed_tokens.weight is head.weight


@pytest.mark.parametrize("kind", ["gemma", "bart"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_embeddings_that_scale(kind: str, dtype) -> None:
    from transformers.models.bart.modeling_bart import BartScaledWordEmbedding
    from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding

    classes = {"gemma": Gemma3TextScaledWordEmbedding, "bart": BartScaledWordEmbedding}
    base = build(dtype)
    base.embed = classes[kind](V, D, 0, embed_scale=3.3).to(dtype)
    model = adapt(base)
    layer = model.get_base_model().embed
    merged = copy.deepcopy(model).merge_and_unload()
    tolerance = 1e-6 if dtype == torch.float32 else 4e-2
    torch.testing.assert_close(
        layer(ids(30)), merged.embed(ids(30)), atol=tolerance, rtol=tolerance
    )
    assert not torch.allclose(layer(ids(30)), base.embed(ids(30)), atol=0.1)


def test_what_is_refused() -> None:
    class Own(nn.Embedding):
        def forward(self, ids):
            return F.layer_norm(super().forward(ids), (D,))

    with pytest.raises(ValueError, match=r"'embed' has `max_norm` \(1.0\): it changes its weight"):
        adapt(build(max_norm=1.0))
    base = build()
    base.embed = Own(V, D)
    with pytest.raises(
        TypeError, match=r"'embed' \(Own\) is not supported: it has a forward of its"
    ):
        adapt(base)
    with pytest.raises(ValueError, match=r"`r` \(9\) must be in \[1, in_features=8\] for 'embed'"):
        adapt(build(), r=9)


@compiles_whole
def test_compiles_in_one_graph() -> None:
    torch._dynamo.reset()
    model = adapt(build())
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for seed in range(3):
        torch.testing.assert_close(compiled(ids(2, 5, seed=seed)), model(ids(2, 5, seed=seed)))
    assert counter.frame_count == 1


def test_gradient_checkpointing_from_the_first_layer() -> None:
    """PEFT and transformers hook the embedding so that its output requires a gradient."""
    base = build_model(V)
    gradients = []
    for checkpointing in (False, True):
        config = PacaConfig(r=R, target_modules=["embed_tokens", "q_proj"])
        model = get_peft_model(copy.deepcopy(base), config)
        fill(model)
        if checkpointing:
            checkpoint(model, use_reentrant=True)
        model(ids(2, 5)).logits.square().sum().backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs)
