"""One tiny model of each kind of weight that adapters change, and what is adapted in it."""

import torch
from transformers import (
    ConvNextConfig,
    ConvNextForImageClassification,
    GPT2Config,
    GPT2LMHeadModel,
    ResNetConfig,
    ResNetForImageClassification,
)

from tests.adapters.fixtures import save_adapter
from tests.conftest import build_model
from tests.tuner import moe

EXPERTS = {"target_modules": ["q_proj"], "target_parameters": moe.BOTH}
PATTERNS = {"rank_pattern": {"down_proj": 2}, "alpha_pattern": {"q_proj": 3}}
OPTIONS = {
    "conv1d": {"target_modules": ["c_attn", "c_fc"]},
    # Patches, depthwise 7 x 7, linear.
    "convnext": {
        "target_modules": ["patch_embeddings", "dwconv", "pwconv1", "downsampling_layer.1"],
        "r": 2,
    },
    # Dense and pointwise convolutions with stride and padding; no size of the input.
    "resnet": {"target_modules": ["convolution"], "r": 2},
    "mixtral": EXPERTS,
    "qwen2": {**EXPERTS, "target_modules": ["q_proj", "shared_expert.down_proj"]},
    "qwen3": {"target_modules": [], "target_parameters": moe.BOTH[1:]},
    "gpt_oss": {**EXPERTS, **PATTERNS},
    "llama4": {**EXPERTS, **PATTERNS},
    "embedding": {"target_modules": ["embed_tokens", "q_proj"]},
}
CONVOLUTIONS = ["convnext", "resnet"]


def build(kind):
    torch.manual_seed(0)
    if kind == "conv1d":
        sizes = {"n_embd": 16, "n_layer": 1, "n_head": 2, "vocab_size": 50, "n_positions": 64}
        return GPT2LMHeadModel(GPT2Config(**sizes))
    if kind == "convnext":
        sizes = {"hidden_sizes": [6, 8], "depths": [1, 1], "num_stages": 2, "image_size": 32}
        return ConvNextForImageClassification(ConvNextConfig(**sizes, num_labels=4))
    if kind == "resnet":
        sizes = {"embedding_size": 8, "hidden_sizes": [16, 32], "depths": [1, 1], "reduction": 2}
        config = ResNetConfig(**sizes, layer_type="bottleneck", num_labels=4)
        return ResNetForImageClassification(config)
    if kind == "embedding":
        return build_model(64)
    return moe.build(kind, dtype=torch.float32)


def save(kind, base, folder, **options):
    """Save an adapter of a saved base; return the adapted model."""
    is_language = kind not in CONVOLUTIONS
    task = {"task_type": "CAUSAL_LM" if is_language else None}
    return save_adapter(base, folder, **{**task, **OPTIONS[kind], **options})
