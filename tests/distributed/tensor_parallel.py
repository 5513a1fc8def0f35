"""Tensor parallel models (transformers' plans), and the same in one process."""

import functools

import pytest
import torch

from tests.distributed import net
from tests.releases import has

UNEVEN = {
    "hidden_size": 30,
    "intermediate_size": 63,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 6,
}

WITH_BIAS = {"attention_bias": True, "mlp_bias": True}


marks = [
    pytest.mark.slow,
    pytest.mark.skipif(not has("transformers", "5.17"), reason="needs transformers >= 5.17"),
]


def load(folder, dtype="float64", plan="auto", parts=True, **sizes):
    """The pretrained model, in one process or in a part on each."""
    from transformers import AutoModelForCausalLM

    options = {}
    if parts:
        from transformers.distributed import DistributedConfig

        sizes = sizes or {"tp_size": torch.distributed.get_world_size()}
        options["distributed_config"] = DistributedConfig(tp_plan=plan, **sizes)
    dtype = getattr(torch, dtype)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **options)


def adapt(base, **options):
    from peft import get_peft_model

    from pacatune import PacaConfig

    options = {"r": 4, "paca_alpha": 8, "target_modules": "all-linear", **options}
    return get_peft_model(base, PacaConfig(**options))


def in_parts(work, folder, plan, *args):
    return work(functools.partial(load, folder, plan=plan), *args)


def whole(tensor):
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().clone()


def gradients(model, batch=0):
    """Logits' loss and gradients on one batch, which are then forgotten."""
    loss = net.loss_of(model, net.batches()[batch])
    loss.backward()
    found = [loss.detach(), *(whole(parameter.grad) for parameter in net.trained(model))]
    model.zero_grad()
    return found


def logits_of(model, **options):
    with torch.no_grad():
        return model(input_ids=net.batches()[0], **options).logits


def step(model, num_steps=2):
    optimizer = torch.optim.AdamW(net.trained(model), lr=1e-2)
    for batch in net.batches()[:num_steps]:
        net.loss_of(model, batch).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model
