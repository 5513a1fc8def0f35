"""Sizes of well-known models, so that an estimate of them needs no file and no network.

The numbers are those of the public `config.json` of each checkpoint; a test holds the number of
parameters that they give against the published one.
"""

from typing import Any, NamedTuple

SIZES = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
)
"""Sizes that every decoder has, by transformers' common names."""


class Preset(NamedTuple):
    """What decides the memory of a decoder-only language model."""

    hub_id: str
    """Checkpoint whose config.json the numbers are from."""
    values: dict[str, Any]
    """Its transformers configuration."""


def _preset(
    hub_id: str,
    sizes: tuple[int, ...],
    max_length: int,
    *,
    kind: str = "llama",
    tied: bool = False,
    **others: Any,
) -> Preset:
    """Return a preset of `sizes` in the order of `SIZES`; `others` only its architecture has."""
    values = {
        "model_type": kind,
        **dict(zip(SIZES, sizes, strict=True)),
        "max_position_embeddings": max_length,
        "tie_word_embeddings": tied,
    }
    return Preset(hub_id, values | others)


# name: hub id, (hidden, MLP, layers, heads, groups, head, vocabulary), positions
PRESETS: dict[str, Preset] = {
    "llama2-7b": _preset("meta-llama/Llama-2-7b-hf", (4096, 11008, 32, 32, 32, 128, 32000), 4096),
    "llama2-13b": _preset("meta-llama/Llama-2-13b-hf", (5120, 13824, 40, 40, 40, 128, 32000), 4096),
    "llama3-8b": _preset("meta-llama/Meta-Llama-3-8B", (4096, 14336, 32, 32, 8, 128, 128256), 8192),
    "llama3.1-70b": _preset(
        "meta-llama/Llama-3.1-70B", (8192, 28672, 80, 64, 8, 128, 128256), 131072
    ),
    "llama3.2-1b": _preset(
        "meta-llama/Llama-3.2-1B", (2048, 8192, 16, 32, 8, 64, 128256), 131072, tied=True
    ),
    "llama3.2-3b": _preset(
        "meta-llama/Llama-3.2-3B", (3072, 8192, 28, 24, 8, 128, 128256), 131072, tied=True
    ),
    "qwen3-8b": _preset(
        "Qwen/Qwen3-8B", (4096, 12288, 36, 32, 8, 128, 151936), 40960, kind="qwen3"
    ),
    # The language model alone: training on text leaves the vision tower out.
    "gemma3-12b": _preset(
        "google/gemma-3-12b-pt",
        (3840, 15360, 48, 16, 8, 256, 262208),
        131072,
        kind="gemma3_text",
        tied=True,
        sliding_window=1024,
        query_pre_attn_scalar=256,
    ),
    "mistral-7b": _preset(
        "mistralai/Mistral-7B-v0.3",
        (4096, 14336, 32, 32, 8, 128, 32768),
        32768,
        kind="mistral",
        sliding_window=None,
    ),
}
