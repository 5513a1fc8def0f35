"""Tiny models of the families that lean modules are for, and twins of them."""

import copy
from contextlib import nullcontext
from dataclasses import replace

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from pacatune import PacaConfig
from pacatune.measure.counters import SavedBytes
from tests.ops.twin import assert_equal, cast
from tests.releases import has
from tools.families import FAMILIES


def with_options(name, **options):
    return replace(FAMILIES[name], options=FAMILIES[name].options | options)


def as_llama(name):
    names = {"model_class": f"{name}ForCausalLM", "config_class": f"{name}Config"}
    return replace(FAMILIES["Llama"], **names)


MODELS = {name: FAMILIES[name] for name in (
    "Llama", "Mistral", "Qwen 2", "Qwen 3", "Gemma 2", "Gemma 3", "Phi-3", "BERT", "ViT", "DINOv2",
    "T5", "Qwen 2 MoE",
)} | {
    "OLMo": as_llama("Olmo"),
    "OLMo 2": as_llama("Olmo2"),
    "SmolLM 2": with_options("Llama", tie_word_embeddings=True),
    "SmolLM 3": as_llama("SmolLM3"),
    "DINOv2, SwiGLU": with_options("DINOv2", use_swiglu_ffn=True),
}  # fmt: skip
# Older releases build some of these in another way: without a module for the activation, with
# attention that can be made lean, with a module for each expert.
LEAST = {"DINOv2, SwiGLU": "5.24", "Gemma 2": "5.24", "Qwen 2 MoE": "5"}
AS_KNOWN = [name for name in MODELS if has("transformers", LEAST.get(name, "4"))]
ADAPTED = sorted(
    set(AS_KNOWN) & {"Llama", "Gemma 2", "Gemma 3", "Phi-3", "Qwen 3", "DINOv2, SwiGLU"}
)


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
    return cast(batch, dtype)


def gradients(model, batch, within=nullcontext):
    """Return the loss and the gradient of each trained parameter, and the bytes kept.

    The forward pass runs within a context, whose hooks may take what would be kept.
    """
    model.zero_grad()
    with SavedBytes(model) as saved, within():
        loss = model(**batch).loss
    loss.backward()
    return results(model, loss), saved.num_bytes


def results(model, loss):
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), **found}


def exact_gradients(model, batch):
    """The same in float64, where lean modules are out of use."""
    return gradients(copy.deepcopy(model).double(), cast(batch, torch.float64))[0]


def classes(model):
    return [type(module) for module in model.modules()]


def assert_close_to_exact(lean, plain, exact):
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
    assert ours <= 2 * theirs + 2e-7 * scale, (ours / scale, theirs / scale)
    assert theirs < 0.3 * scale


def adapt(model, method="paca", **options):
    """Return the model with random adapters of a method."""
    torch.manual_seed(0)
    options = {"r": 4, "target_modules": "all-linear", **options}
    if method in ("paca", "channels"):
        channels = 8 if method == "channels" else None
        config = PacaConfig(init_weights=False, channels=channels, **options)
    else:
        config = LoraConfig(use_dora=method == "dora", **options)
    model = get_peft_model(model, config).train()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    return model


def adapted(name="Llama", dtype=torch.float32):
    return adapt(build(name, dtype))


def assert_equal_results(ours, theirs):
    assert_equal(ours, theirs, atol=2e-6, rtol=2e-4)
