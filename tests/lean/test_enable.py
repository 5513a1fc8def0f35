"""Lean models among everything else that is done to models."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from pacatune import PacaConfig, lean
from tests.lean.models import assert_equal_results, build, classes, gradients
from tests.releases import compiles_whole


@pytest.mark.parametrize("level", [1, 3])
@compiles_whole
def test_compile(model, batch, level):
    plain, _ = gradients(model, batch)
    lean.enable(model, level=level)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    model.compile(backend=counter, fullgraph=True)
    ours, _ = gradients(model, batch)
    assert counter.frame_count == 1
    assert_equal_results(ours, plain)


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


def test_evaluation_and_generation_take_the_modules_own_way(model, batch):
    ids = batch["input_ids"][2:]
    model.eval()
    options = {"max_new_tokens": 4, "do_sample": False}
    expected = model.generate(input_ids=ids, **options), model(**batch).logits
    lean.enable(model)
    assert torch.equal(model.generate(input_ids=ids, **options), expected[0])
    assert torch.equal(model(**batch).logits, expected[1])


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


@pytest.mark.parametrize(
    ("model", "options", "words"),
    [
        ({}, {}, r"`model` is a dict; give a torch\.nn\.Module\."),
        (nn.Linear(2, 2), {"mode": "off"}, r"`mode` \('off'\) must be one of \('auto', "),
        (nn.Linear(2, 2), {"mode": "require"}, "cannot be all lean"),
        *(
            (nn.Linear(2, 2), {"level": level},
             rf"`level` \({level!r}\) must be one of \(1, 2, 3\); to do without, call")
            for level in (0, 4, "2", None)
        ),
    ],
)  # fmt: skip
def test_errors(model, options, words):
    with pytest.raises((TypeError, ValueError), match=words):
        lean.enable(model, **options)
