"""Sizes of well-known models, so that an estimate of them needs no file and no network.

The numbers are those of the public `config.json` of each checkpoint; a test holds the number of
parameters that they give against the published one.
"""

from dataclasses import asdict, dataclass, field
from typing import Any

__all__ = ["PRESETS", "Preset"]


@dataclass(frozen=True, kw_only=True)
class Preset:
    """What decides the memory of a decoder-only language model."""

    hub_id: str
    """Checkpoint whose config.json the numbers are from."""
    model_type: str
    """transformers' name of the architecture."""
    num_parameters: int
    """All parameters of the language model, a tied head counted once."""
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    max_position_embeddings: int
    tie_word_embeddings: bool = False
    extra: dict[str, Any] = field(default_factory=dict)
    """What only this architecture has."""

    def to_values(self) -> dict[str, Any]:
        """Return the values of the transformers configuration."""
        values = asdict(self)
        for name in ("hub_id", "model_type", "num_parameters", "extra"):
            del values[name]
        return values | self.extra


def _llama(hub_id: str, num_parameters: int, **sizes: Any) -> Preset:
    return Preset(hub_id=hub_id, model_type="llama", num_parameters=num_parameters, **sizes)


PRESETS: dict[str, Preset] = {
    "llama2-7b": _llama(
        "meta-llama/Llama-2-7b-hf",
        6_738_415_616,
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=32,
        head_dim=128,
        vocab_size=32000,
        max_position_embeddings=4096,
    ),
    "llama2-13b": _llama(
        "meta-llama/Llama-2-13b-hf",
        13_015_864_320,
        hidden_size=5120,
        intermediate_size=13824,
        num_hidden_layers=40,
        num_attention_heads=40,
        num_key_value_heads=40,
        head_dim=128,
        vocab_size=32000,
        max_position_embeddings=4096,
    ),
    "llama3-8b": _llama(
        "meta-llama/Meta-Llama-3-8B",
        8_030_261_248,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        vocab_size=128256,
        max_position_embeddings=8192,
    ),
    "llama3.1-70b": _llama(
        "meta-llama/Llama-3.1-70B",
        70_553_706_496,
        hidden_size=8192,
        intermediate_size=28672,
        num_hidden_layers=80,
        num_attention_heads=64,
        num_key_value_heads=8,
        head_dim=128,
        vocab_size=128256,
        max_position_embeddings=131072,
    ),
    "llama3.2-1b": _llama(
        "meta-llama/Llama-3.2-1B",
        1_235_814_400,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=64,
        vocab_size=128256,
        max_position_embeddings=131072,
        tie_word_embeddings=True,
    ),
    "llama3.2-3b": _llama(
        "meta-llama/Llama-3.2-3B",
        3_212_749_824,
        hidden_size=3072,
        intermediate_size=8192,
        num_hidden_layers=28,
        num_attention_heads=24,
        num_key_value_heads=8,
        head_dim=128,
        vocab_size=128256,
        max_position_embeddings=131072,
        tie_word_embeddings=True,
    ),
    "qwen3-8b": Preset(
        hub_id="Qwen/Qwen3-8B",
        model_type="qwen3",
        num_parameters=8_190_735_360,
        hidden_size=4096,
        intermediate_size=12288,
        num_hidden_layers=36,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        vocab_size=151936,
        max_position_embeddings=40960,
    ),
    # The language model alone: training on text leaves the vision tower out.
    "gemma3-12b": Preset(
        hub_id="google/gemma-3-12b-pt",
        model_type="gemma3_text",
        num_parameters=11_766_034_176,
        hidden_size=3840,
        intermediate_size=15360,
        num_hidden_layers=48,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=256,
        vocab_size=262208,
        max_position_embeddings=131072,
        tie_word_embeddings=True,
        extra={"sliding_window": 1024, "query_pre_attn_scalar": 256},
    ),
    "mistral-7b": Preset(
        hub_id="mistralai/Mistral-7B-v0.3",
        model_type="mistral",
        num_parameters=7_248_023_552,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        vocab_size=32768,
        max_position_embeddings=32768,
        extra={"sliding_window": None},
    ),
}
