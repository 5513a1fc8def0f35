"""What a trainer should be served as, and what vLLM's tensor-parallel ranks hold of it."""

import torch
from torch import nn


def held_by(tensors, rank=0, size=1):
    """Return a rank's tensors of a Llama with two heads of keys, of which each rank has one."""
    kv_size = min(size, 2)

    def own(name, which=rank, parts=size):
        return tensors[name].chunk(parts)[which]

    held = {}
    for name, tensor in tensors.items():
        owner, _, module = name.removesuffix(".weight").rpartition(".")
        if module == "q_proj":
            keys, values = (
                own(f"{owner}.{one}_proj.weight", rank * kv_size // size, kv_size) for one in "kv"
            )
            held[f"{owner}.qkv_proj.weight"] = torch.cat([own(name), keys, values])
        elif module == "gate_proj":
            joined = torch.cat([own(name), own(f"{owner}.up_proj.weight")])
            held[f"{owner}.gate_up_proj.weight"] = joined
        elif module in ("o_proj", "down_proj"):
            held[name] = tensor.chunk(size, 1)[rank].contiguous()
        elif module in ("embed_tokens", "lm_head"):
            padded = nn.functional.pad(tensor, (0, 0, 0, -len(tensor) % 64))
            held[name] = padded.chunk(size)[rank].contiguous()
        elif module not in ("k_proj", "v_proj", "up_proj"):
            held[name] = tensor.clone()
    return held


def experts_held_by(tensors, rank, size):
    held = {}
    for name, tensor in tensors.items():
        if name.endswith("experts.gate_up_proj"):
            halves = [half.chunk(size, 1)[rank] for half in tensor.chunk(2, 1)]
            held[name.replace("gate_up_proj", "w13_weight")] = torch.cat(halves, 1)
        elif name.endswith("experts.down_proj"):
            held[name.replace("down_proj", "w2_weight")] = tensor.chunk(size, 2)[rank].contiguous()
    return held


def trained_state(model):
    """A trainer's W' under the checkpoint's names; the model is merged for it."""
    model.merge_adapter()
    state = {
        name.removeprefix("base_model.model.").replace(".base_layer", ""): tensor.clone()
        for name, tensor in model.state_dict().items()
        if "paca_" not in name
    }
    model.unmerge_adapter()
    return state
