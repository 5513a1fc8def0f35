"""A small Llama with an adapter that does something."""

import copy

import torch
from peft import get_peft_model

from pacatune import PacaConfig
from pacatune.tuner import PacaLayer

TARGETS = ["q_proj", "v_proj", "down_proj"]


def adapt(base, seed=0, **options):
    config = PacaConfig(**{"r": 4, "target_modules": TARGETS, "task_type": "CAUSAL_LM", **options})
    model = get_peft_model(copy.deepcopy(base), config)
    randomise(model, seed)
    return model


def randomise(model, seed=0, adapter="default"):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in paca_layers(model):
            if adapter in layer.r:
                layer.delta_of(adapter).normal_(std=0.2, generator=generator)


def paca_layers(model):
    return [module for module in model.modules() if isinstance(module, PacaLayer)]


def logits(model, ids, **kwargs):
    with torch.no_grad():
        return model.eval()(input_ids=ids, **kwargs).logits
