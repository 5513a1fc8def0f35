"""Tiny models of the families that lean modules are for, and twins of them."""

import copy

import torch
from peft import get_peft_model
from torch import nn

from pacatune import PacaConfig
from pacatune.measure.counters import SavedBytes
from tests.releases import has
from tools.families import FAMILIES, VOCAB_SIZE, Family

SIZES = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def decoder(name, **options):
    return Family(
        model_class=f"{name}ForCausalLM", config_class=f"{name}Config", options=SIZES | options
    )


MODELS = {name: FAMILIES[name] for name in (
    "Llama", "Mistral", "Qwen 2", "Qwen 3", "Gemma 2", "Gemma 3", "Phi-3", "BERT", "ViT", "DINOv2",
    "T5", "Qwen 2 MoE",
)} | {
    "OLMo": decoder("Olmo"),
    "OLMo 2": decoder("Olmo2"),
    "SmolLM 2": decoder("Llama", tie_word_embeddings=True, hidden_act="silu"),
    "SmolLM 3": decoder("SmolLM3"),
    "DINOv2, SwiGLU": Family(
        model_class="Dinov2ForImageClassification",
        config_class="Dinov2Config",
        options={**FAMILIES["DINOv2"].options, "use_swiglu_ffn": True},
        batch="image",
    ),
}  # fmt: skip
# Older releases build some of these in another way: without a module for the activation, with
# attention that can be made lean, with a module for each expert.
LEAST = {"DINOv2, SwiGLU": "5.24", "Gemma 2": "5.24", "Qwen 2 MoE": "5"}
AS_KNOWN = [name for name in MODELS if has("transformers", LEAST.get(name, "4"))]


def build(name, dtype=torch.float32):
    """The model in training mode, without anything random."""
    model = MODELS[name].build().to(dtype).train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for attribute in ("dropout", "dropout_rate", "dropout_prob"):
            if isinstance(getattr(module, attribute, None), float):
                setattr(module, attribute, 0.0)
    if name == "Qwen 2 MoE":
        model.set_experts_implementation("eager")  # the other takes no float64
    return model


def make_batch(name, dtype=torch.float32):
    """A batch whose rows of tokens end with padding, as far as that goes."""
    batch = MODELS[name].make_batch()
    if "input_ids" in batch and batch["labels"].dim() == 2 and name != "T5":
        mask = torch.ones_like(batch["input_ids"])
        mask[0, -5:] = mask[1, -2:] = 0
        batch |= {"attention_mask": mask, "labels": batch["labels"].masked_fill(mask == 0, -100)}
    return {
        name: x.to(dtype) if isinstance(x, torch.Tensor) and x.is_floating_point() else x
        for name, x in batch.items()
    }


def gradients(model, batch):
    """Return the loss and the gradient of each trained parameter, and the bytes kept."""
    model.zero_grad()
    with SavedBytes(model) as saved:
        loss = model(**batch).loss
    loss.backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), **found}, saved.num_bytes


def exact_gradients(model, batch):
    """The same in float64, where lean modules are out of use."""
    wide = {
        name: x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x
        for name, x in batch.items()
    }
    return gradients(copy.deepcopy(model).double(), wide)[0]


def classes(model):
    return [type(module) for module in model.modules()]


def assert_close_to_exact(lean, plain, exact, factor=2.0):
    """All gradients together: errors against float64, ours against those of plain autograd."""
    assert lean.keys() == plain.keys() == exact.keys()
    ours, theirs, scale = (
        sum(
            float((r[n].double() - (exact[n] if r is not exact else 0)).square().sum())
            for n in exact
        )
        ** 0.5
        for r in (lean, plain, exact)
    )
    # Within a few units of float32, in which norms are computed in any model, neither is exact.
    assert ours <= factor * theirs + 2e-7 * scale, (ours / scale, theirs / scale)
    assert theirs < 0.3 * scale


def adapted(name="Llama", dtype=torch.float32, **options):
    config = PacaConfig(r=4, target_modules="all-linear", init_weights=False, **options)
    torch.manual_seed(0)
    return get_peft_model(build(name, dtype), config).train()


def assert_equal_results(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, expected in theirs.items():
        torch.testing.assert_close(ours[name], expected, atol=2e-6, rtol=2e-4, msg=name)
