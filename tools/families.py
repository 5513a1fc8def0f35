"""Tiny models of the families that docs/index.md names, for tests."""

from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor, nn

__all__ = ["FAMILIES", "Family"]

VOCAB_SIZE, IMAGE_SIZE, NUM_FRAMES = 64, 16, 32

_SIZES = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
_IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_TEXT = {**_SIZES, **_IDS, "max_position_embeddings": 64}
_DECODER = {**_TEXT, "num_key_value_heads": 2, "head_dim": 8}
_MOE = {"moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2}
_IMAGE = {**_SIZES, "image_size": IMAGE_SIZE, "patch_size": 8, "num_labels": 3}
_IMAGE.pop("vocab_size")
_GPT2 = {"vocab_size": VOCAB_SIZE, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
_T5 = {"vocab_size": VOCAB_SIZE, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2}
_WHISPER = {
    "vocab_size": VOCAB_SIZE,
    "d_model": 32,
    "num_mel_bins": 8,
    "max_source_positions": NUM_FRAMES // 2,
    **{f"{side}_layers": 2 for side in ("encoder", "decoder")},
    **{f"{side}_attention_heads": 4 for side in ("encoder", "decoder")},
    **{f"{side}_ffn_dim": 48 for side in ("encoder", "decoder")},
    **{f"{name}_token_id": 0 for name in ("pad", "bos", "decoder_start")},
    "eos_token_id": 1,
}


@dataclass(frozen=True, kw_only=True)
class Family:
    """A tiny random model of one family and a batch for it."""

    model_class: str
    config_class: str
    options: dict[str, Any]
    batch: str = "causal"

    def build(self, seed: int = 0) -> nn.Module:
        """Return the model in float32, in evaluation mode."""
        config = getattr(transformers, self.config_class)(**self.options)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return getattr(transformers, self.model_class)(config).eval()

    def make_batch(self) -> dict[str, Any]:
        """Return keyword arguments of the model that make it compute a loss."""
        generator = torch.Generator().manual_seed(0)
        tokens = torch.randint(3, VOCAB_SIZE, (4, 20), generator=generator)
        classes = torch.arange(4) % 3
        pixels = torch.randn(4, 3, IMAGE_SIZE, IMAGE_SIZE, generator=generator)
        frames = torch.randn(4, 8, NUM_FRAMES, generator=generator)
        batches: dict[str, dict[str, Tensor | bool]] = {
            "causal": {"input_ids": tokens, "labels": tokens},
            "classes": {"input_ids": tokens, "labels": classes},
            "image": {"pixel_values": pixels, "labels": classes},
            "pairs": {"input_ids": tokens, "pixel_values": pixels, "return_loss": True},
            "speech": {"input_features": frames, "labels": tokens},
        }
        return batches[self.batch]


def _decoder(name: str, config: str | None = None, **options: Any) -> Family:
    return Family(
        model_class=f"{name}ForCausalLM",
        config_class=config or f"{name}Config",
        options={**_DECODER, **options},
    )


def _classifier(name: str, options: dict[str, Any], batch: str = "classes") -> Family:
    kind = "Image" if batch == "image" else "Sequence"
    return Family(
        model_class=f"{name}For{kind}Classification",
        config_class=f"{name}Config",
        options={**options, "num_labels": 3},
        batch=batch,
    )


FAMILIES: dict[str, Family] = {
    "Llama": _decoder("Llama"),
    "Mistral": _decoder("Mistral"),
    "Qwen 2": _decoder("Qwen2"),
    "Qwen 3": _decoder("Qwen3"),
    "Gemma 2": _decoder("Gemma2", sliding_window=16),
    "Gemma 3": _decoder("Gemma3", "Gemma3TextConfig", sliding_window=16),
    "Gemma 3 (multimodal)": Family(
        model_class="Gemma3ForConditionalGeneration",
        config_class="Gemma3Config",
        options={
            "text_config": {**_DECODER, "sliding_window": 16},
            "vision_config": {**_IMAGE, "num_channels": 3},
            "mm_tokens_per_image": 4,
            "image_token_index": VOCAB_SIZE - 1,
        },
    ),
    "Phi-3": _decoder("Phi3"),
    "GPT-2": Family(
        model_class="GPT2LMHeadModel", config_class="GPT2Config", options={**_IDS, **_GPT2}
    ),
    "GPT-NeoX": _decoder("GPTNeoX"),
    "OPT": _decoder("OPT", ffn_dim=48, word_embed_proj_dim=16),
    "BERT": _classifier("Bert", _TEXT),
    "RoBERTa": _classifier("Roberta", _TEXT),
    "ModernBERT": _classifier("ModernBert", {**_TEXT, "cls_token_id": 1, "sep_token_id": 2}),
    "T5": Family(
        model_class="T5ForConditionalGeneration",
        config_class="T5Config",
        options={**_T5, "num_heads": 4, "decoder_start_token_id": 0},
    ),
    "ViT": _classifier("ViT", _IMAGE, "image"),
    "DINOv2": _classifier("Dinov2", _IMAGE, "image"),
    "Mixtral": _decoder("Mixtral", num_local_experts=4),
    "Qwen 2 MoE": _decoder("Qwen2Moe", shared_expert_intermediate_size=16, **_MOE),
    "Qwen 3 MoE": _decoder("Qwen3Moe", **_MOE),
    "CLIP": Family(
        model_class="CLIPModel",
        config_class="CLIPConfig",
        options={"text_config": _TEXT, "vision_config": _IMAGE, "projection_dim": 16},
        batch="pairs",
    ),
    "Whisper": Family(
        model_class="WhisperForConditionalGeneration",
        config_class="WhisperConfig",
        options=_WHISPER,
        batch="speech",
    ),
}
