"""Logits that are never kept, and heads that are left alone."""

import pytest
import torch
from torch.nn import functional as F

from pacatune import lean
from tests.lean.models import adapt, adapted, assert_equal_results, build, gradients, make_batch


def test_logits_can_be_read_in_training_and_used_in_a_loss_of_ones_own(model, batch):
    """Without labels nothing stands for them."""
    expected, loss = model(**batch).logits, model(**batch, num_items_in_batch=7).loss
    lean.enable(model)
    torch.testing.assert_close(model(**batch).logits.argmax(-1), expected.argmax(-1))
    torch.testing.assert_close(model(**batch, num_items_in_batch=7).loss, loss)
    logits = model(**{n: x for n, x in batch.items() if n != "labels"}).logits
    assert isinstance(logits, torch.Tensor)
    F.cross_entropy(logits.flatten(0, 1), batch["input_ids"].flatten()).backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


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
    model = adapt(build("Llama"), target_modules=["q_proj"], modules_to_save=["lm_head"])
    plain, plain_bytes = gradients(model, batch)
    report = lean.enable(model)
    assert report.made["loss"] == ["base_model.model"]
    ours, lean_bytes = gradients(model, batch)
    assert any("lm_head" in name for name in plain)
    assert_equal_results(ours, plain)
    assert lean_bytes < plain_bytes


def test_an_adapter_on_the_head_is_left_alone(batch):
    model = adapt(build("Llama"), target_modules=["lm_head", "q_proj"])
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
    later = adapt(model)
    ours, _ = gradients(later, batch)
    lean.disable(later)
    assert_equal_results(ours, gradients(later, batch)[0])


def test_hooks_and_loss_functions_of_ones_own_get_tensors(batch):
    model, seen = build("Llama"), []
    lean.enable(model)

    def loss_function(logits, labels, **kwargs):
        seen.append(logits)
        return logits.float().mean()

    model.loss_function = loss_function
    model(**batch).loss.backward()
    model = adapted()
    lean.enable(model)
    model.get_output_embeddings().register_forward_hook(lambda *args: seen.append(args[2]))
    model(**batch)
    assert [isinstance(one, torch.Tensor) for one in seen] == [True, True]
