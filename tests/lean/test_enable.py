"""Lean models among everything else that is done to models."""

import copy
import gc
import pickle
import warnings

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn import functional as F

from pacatune import PacaConfig, lean
from pacatune.lean.interface import find_registry
from tests.lean.models import build, classes, gradients, make_batch


def adapted(name="Llama", dtype=torch.float32, **options):
    config = PacaConfig(r=4, target_modules="all-linear", init_weights=False, **options)
    torch.manual_seed(0)
    return get_peft_model(build(name, dtype), config).train()


def assert_equal_results(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, expected in theirs.items():
        torch.testing.assert_close(ours[name], expected, atol=2e-6, rtol=2e-4, msg=name)


@pytest.fixture
def model():
    return adapted()


@pytest.fixture
def batch():
    return make_batch("Llama")


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing(model, batch, use_reentrant):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*gradient_checkpointing_enable", FutureWarning)
        model.get_base_model().gradient_checkpointing_enable(
            gradient_checkpointing_kwargs={"use_reentrant": use_reentrant}
        )
    model.enable_input_require_grads()
    batch["use_cache"] = False
    plain, plain_bytes = gradients(model, batch)
    lean.enable(model)
    ours, lean_bytes = gradients(model, batch)
    assert_equal_results(ours, plain)
    assert lean_bytes < plain_bytes


def test_autocast(model, batch):
    with torch.autocast("cpu", torch.bfloat16):
        plain, plain_bytes = gradients(model, batch)
        lean.enable(model)
        ours, lean_bytes = gradients(model, batch)
    assert lean_bytes < plain_bytes
    for name, expected in plain.items():
        assert (ours[name] - expected).norm() <= 0.05 * expected.norm(), name


def test_compile(model, batch):
    plain, _ = gradients(model, batch)
    lean.enable(model)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    model.compile(backend=counter, fullgraph=True)
    ours, _ = gradients(model, batch)
    assert counter.frame_count == 1
    assert_equal_results(ours, plain)


def test_ten_steps_are_those_of_a_twin(model, batch):
    twin = copy.deepcopy(model)
    lean.enable(model)
    losses = []
    for contender in (model, twin):
        trained = [p for p in contender.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-2)
        losses.append([])
        for _ in range(10):
            for _ in range(2):
                loss = contender(**batch).loss / 2
                loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[-1].append(loss.item())
    assert losses[0] == pytest.approx(losses[1], abs=2e-4)
    assert losses[1][-1] < losses[1][0] - 0.05


def test_disabled_and_looked_at_between_forward_and_backward(model, batch):
    plain, _ = gradients(model, batch)
    lean.enable(model)
    model.zero_grad()
    loss = model(**batch).loss
    base = model.state_dict()
    with model.disable_adapter(), torch.no_grad():
        model(**batch)
    lean.disable(model)
    loss.backward()
    ours = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert_equal_results({"loss": loss.detach(), **ours}, plain)
    assert all(torch.equal(base[name], x) for name, x in model.state_dict().items())


@pytest.mark.parametrize("state", ["disabled", "merged", "two", "hooked", "base hooked"])
def test_adapters_in_other_states(model, batch, state):
    if state == "two":
        model.add_adapter("other", PacaConfig(r=2, target_modules="all-linear", init_weights=False))
        model.base_model.set_adapter(["default", "other"])
    if state == "merged":
        model.merge_adapter()
    layers = [m for n, m in model.named_modules() if n.endswith("down_proj")]
    calls = []
    for layer in layers if "hooked" in state else ():
        target = layer.base_layer if "base" in state else layer
        target.register_forward_hook(lambda *args: calls.append(args[0]))
    model.enable_input_require_grads()  # something to differentiate without adapters
    plain = outcome(model, batch, state)
    num_calls = len(calls)
    lean.enable(model)
    assert_equal_results(outcome(model, batch, state), plain)
    assert len(calls) == 2 * num_calls


def outcome(model, batch, state):
    if state != "disabled":
        return gradients(model, batch)[0]
    with model.disable_adapter():
        ids = batch["input_ids"]
        x = model.get_input_embeddings()(ids).detach().requires_grad_()
        rest = {name: value for name, value in batch.items() if name != "input_ids"}
        loss = model(inputs_embeds=x, **rest).loss
        return {"loss": loss.detach(), "x": torch.autograd.grad(loss, x)[0]}


def test_down_proj_keeps_nothing_of_its_own(batch):
    """With hooks it must be called, and then keeps its columns of the product."""
    model = adapted(dtype=torch.bfloat16)
    lean.enable(model)
    _, together = gradients(model, batch)
    for name, layer in model.named_modules():
        if name.endswith("down_proj"):
            layer.register_forward_hook(lambda *args: None)
    _, apart = gradients(model, batch)
    assert apart - together == 2 * batch["input_ids"].numel() * 4 * 2


def test_evaluation_and_generation_take_the_modules_own_way(model, batch):
    ids = batch["input_ids"][2:]
    model.eval()
    options = {"max_new_tokens": 4, "do_sample": False}
    expected = model.generate(input_ids=ids, **options), model(**batch).logits
    lean.enable(model)
    assert torch.equal(model.generate(input_ids=ids, **options), expected[0])
    assert torch.equal(model(**batch).logits, expected[1])


def test_logits_can_be_read_in_training(model, batch):
    expected = model(**batch).logits
    lean.enable(model)
    output = model(**batch)
    torch.testing.assert_close(output.logits.argmax(-1), expected.argmax(-1))
    without_labels = {n: x for n, x in batch.items() if n != "labels"}
    assert isinstance(model(**without_labels).logits, torch.Tensor)


def test_num_items_in_batch(model, batch):
    expected = model(**batch, num_items_in_batch=7).loss
    lean.enable(model)
    torch.testing.assert_close(model(**batch, num_items_in_batch=7).loss, expected)


@pytest.mark.parametrize("name", ["Gemma 2", "SmolLM 2"])
def test_the_head_keeps_no_logits(name):
    """With a soft cap, and tied to the embedding."""
    model = adapted(name)
    batch = make_batch(name)
    head = model.get_output_embeddings()
    lean.enable(model)
    logits = model(**batch).logits
    assert type(logits).__name__ == "LazyLogits"
    assert logits._logits is None
    assert tuple(logits.shape) == (4, 20, head.out_features)


def test_a_trained_copy_of_the_head(batch):
    model = build("Llama")
    config = PacaConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"])
    model = get_peft_model(model, config).train()
    plain, plain_bytes = gradients(model, batch)
    report = lean.enable(model)
    assert report.made["loss"] == ["base_model.model"]
    ours, lean_bytes = gradients(model, batch)
    assert any("lm_head" in name for name in plain)
    assert_equal_results(ours, plain)
    assert lean_bytes < plain_bytes


@pytest.mark.parametrize("kind", [PacaConfig, LoraConfig])
def test_an_adapter_on_the_head_is_left_alone(batch, kind):
    model = get_peft_model(build("Llama"), kind(r=4, target_modules=["lm_head", "q_proj"])).train()
    plain, _ = gradients(model, batch)
    report = lean.enable(model)
    assert "loss" not in report.made
    ((reason, names),) = report.left.items()
    assert reason == "the output head is a Linear, so its logits are kept"
    assert names == ["base_model.model"]
    assert_equal_results(gradients(model, batch)[0], plain)


def test_an_adapter_that_comes_later(batch):
    model = build("Llama")
    lean.enable(model)
    later = get_peft_model(model, PacaConfig(r=4, target_modules="all-linear", init_weights=False))
    ours, _ = gradients(later, batch)
    lean.disable(later)
    assert_equal_results(ours, gradients(later, batch)[0])


def test_a_loss_function_of_ones_own_gets_a_tensor(batch):
    model = build("Llama")
    lean.enable(model)
    found = []

    def loss_function(logits, labels, **kwargs):
        found.append(logits)
        return logits.float().mean()

    model.loss_function = loss_function
    model(**batch).loss.backward()
    assert isinstance(found[0], torch.Tensor)


@pytest.mark.parametrize("is_bias_trained", [True, False])
def test_attention_with_a_bias(is_bias_trained):
    """A bias that is learned gets its gradient; one that is not changes nothing."""
    model = build("Llama")
    attention = model.model.layers[0].self_attn
    generator = torch.Generator().manual_seed(0)
    bias = torch.randn(1, 4, 6, 6, generator=generator).requires_grad_(is_bias_trained)
    results = []
    for is_lean in (False, True):
        if is_lean:
            lean.enable(model)
        query, key, value = (
            torch.randn(2, heads, 6, 8, generator=torch.Generator().manual_seed(1)).requires_grad_()
            for heads in (4, 2, 2)
        )
        mask = torch.ones(2, 1, 6, 6, dtype=torch.bool).tril()
        inputs = [query, key, value, *([bias] if is_bias_trained else [])]
        apply = find_registry()["sdpa"]
        y, _ = apply(attention, query, key, value, mask, position_bias=bias, scaling=0.3)
        results.append([y, *torch.autograd.grad(y.square().sum(), inputs)])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_a_head_with_hooks_is_called_as_it_was(batch):
    model = adapted()
    lean.enable(model)
    outputs = []
    model.get_output_embeddings().register_forward_hook(lambda *args: outputs.append(args[2]))
    model(**batch)
    assert isinstance(outputs[0], torch.Tensor)


def test_copies_and_pickles_are_plain(model, batch):
    lean.enable(model)
    expected, _ = gradients(model, batch)
    copied, loaded = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    lean.disable(model)
    for other in (copied, loaded):
        assert classes(other) == classes(model)
        assert_equal_results(gradients(other, batch)[0], expected)


def test_the_arguments_of_a_model_keep_their_names(model):
    import inspect

    base = model.get_base_model()
    before = inspect.signature(base.forward), type(base).__name__, repr(base)
    lean.enable(model)
    assert (inspect.signature(base.forward), type(base).__name__, repr(base)) == before
    assert isinstance(base, type(build("Llama")))


def test_a_class_that_was_derived_since(model, batch):
    """As fully_shard does."""
    norm = model.get_base_model().model.norm
    plain = type(norm)
    lean.enable(model)
    norm.__class__ = type("Sharded" + plain.__name__, (type(norm),), {"mark": 1})
    lean.enable(model)
    lean.disable(model)
    assert type(norm).__name__ == "Sharded" + plain.__name__
    assert type(norm).__bases__ == (plain,)
    assert norm.mark == 1
    assert isinstance(gradients(model, batch)[0]["loss"], torch.Tensor)


@pytest.fixture
def _no_other_models():
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


def test_replaced_forwards_are_left_alone(batch):
    model = build("Llama")
    mlp, norm = model.model.layers[0].mlp, model.model.norm
    for module in (mlp, norm, model):
        module.forward = module.forward
    report = lean.enable(model)
    assert "model.layers.0.mlp" not in report.made["gated_mlp"]
    assert "loss" not in report.made
    assert any("its forward was replaced" in reason for reason in report.left)
    assert any("replaced the model's forward" in reason for reason in report.left)
    assert "forward" in vars(mlp)


class Almost(nn.Module):
    """A gated MLP that does a little more."""

    def __init__(self, twist):
        super().__init__()
        self.a, self.b = nn.Linear(4, 6), nn.Linear(4, 6)
        self.c, self.act = nn.Linear(6, 4), nn.SiLU()
        self.twist = twist

    def forward(self, x):
        gate, up = self.a(x), self.b(x)
        if self.twist == "swapped":
            gate, up = up, gate
        h = self.act(gate) * up
        if self.twist == "scaled":
            h = h * 1.001
        if self.twist == "clipped":
            h = h.clamp(-50, 50)
        return self.c(h)


class SomeNorm(nn.Module):
    def __init__(self, twist):
        super().__init__()
        self.weight, self.eps, self.twist = nn.Parameter(torch.ones(8)), 1e-6, twist

    def forward(self, x):
        wide = x.float()
        mean = wide.square().mean(-1, keepdim=True)
        eps = 1e-4 if self.twist == "other eps" else self.eps
        n = (wide * torch.rsqrt(mean + eps)).to(x.dtype)
        return self.weight * (n * 2 if self.twist == "doubled" else n)


@pytest.mark.parametrize("twist", [None, "swapped"])
def test_any_gated_mlp_is_found(twist):
    module = nn.Sequential(Almost(twist))
    x = torch.randn(3, 4)
    expected = module(x)
    assert lean.enable(module).made == {"gated_mlp": ["0"]}
    torch.testing.assert_close(module(x), expected)


@pytest.mark.parametrize("twist", ["scaled", "clipped"])
def test_what_does_a_little_more_is_left_alone(twist):
    module = nn.Sequential(Almost(twist))
    report = lean.enable(module)
    assert report.made == {}
    assert report.left == {
        "Almost is not down(act(gate(x)) * up(x)) with a known activation": ["0"]
    }


def test_convolutions_under_adapters_are_no_gated_mlp():
    # PEFT's layers around convolutions have in_features and out_features; by them, an inverted
    # residual that widens 6 channels to 24 could be one layer for gate and up.
    block = nn.Sequential(nn.Conv2d(6, 24, 1), nn.ReLU(), nn.Conv2d(12, 6, 1))
    model = nn.ModuleDict({"block": block})
    config = LoraConfig(r=2, target_modules=["block.0", "block.2"])
    report = lean.enable(get_peft_model(model, config))
    assert not report.left


def test_any_norm_is_found_and_no_other():
    modules = nn.ModuleDict(
        {"a": SomeNorm(None), "b": SomeNorm("other eps"), "c": SomeNorm("doubled")}
    )
    report = lean.enable(modules)
    assert report.made == {"norm": ["a"]}
    assert report.left == {"SomeNorm is no RMSNorm or LayerNorm we know": ["b", "c"]}


def test_torchs_rms_norm_is_found():
    model = nn.Sequential(nn.RMSNorm(8, eps=1e-6)).bfloat16()
    x = torch.randn(3, 8, dtype=torch.bfloat16, requires_grad=True)
    expected = model(x)
    report = lean.enable(model, mode="require")
    assert report.made == {"norm": ["0"]}
    assert torch.equal(model(x), expected)


def test_errors():
    with pytest.raises(TypeError, match=r"`model` is a dict; give a torch\.nn\.Module\."):
        lean.enable({})
    with pytest.raises(ValueError, match=r"`mode` \('off'\) must be 'auto' or 'require'"):
        lean.enable(nn.Linear(2, 2), mode="off")
    with pytest.raises(ValueError, match="cannot be all lean"):
        lean.enable(nn.Linear(2, 2), mode="require")


def test_names():
    assert lean.__all__ == sorted(lean.__all__)
    assert {"enable", "disable", "LeanReport"} <= set(lean.__all__)


def test_report_as_json(model):
    import json

    report = lean.enable(model).to_dict()
    assert json.loads(json.dumps(report)) == report
    assert report["made"]["loss"] == ["base_model.model"]


def test_a_loss_of_ones_own_over_logits(model, batch):
    """No labels, so nothing stands for the logits."""
    lean.enable(model)
    logits = model(input_ids=batch["input_ids"]).logits
    F.cross_entropy(logits.flatten(0, 1), batch["input_ids"].flatten()).backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
