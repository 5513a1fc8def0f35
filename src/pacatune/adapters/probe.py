"""Run fixed inputs through two models and measure how far apart their outputs are."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from pacatune.residency import resident

PROBE_TEXT = "The capital of France is Paris. In 1889, 41 metres (134 ft) remained to be built."

_NUM_SEQUENCES, _NUM_TOKENS = 2, 32


@dataclass(frozen=True, kw_only=True)
class OutputError:
    """How far one model's outputs are from another's."""

    max_absolute: float
    """Largest absolute difference."""
    max_relative: float
    """The same, divided by the largest absolute output of the reference."""


def probe_inputs(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase | None = None
) -> list[dict[str, Tensor]]:
    """Return fixed inputs for a model: random tokens, pixels or sounds by seed, and a text."""
    config: Any = model.config
    main_input = getattr(model, "main_input_name", "input_ids")
    generator = torch.Generator().manual_seed(0)
    if main_input == "pixel_values":
        batches = [{"pixel_values": _pixels(config, generator)}]
    elif main_input == "input_features" and hasattr(config, "num_mel_bins"):
        frames = (_NUM_SEQUENCES, config.num_mel_bins, 2 * config.max_source_positions)
        features = torch.randn(frames, generator=generator, device="cpu")
        batches = [{"input_features": features, "decoder_input_ids": _tokens(config, generator)}]
    elif main_input == "input_ids":
        vocab_size = config.get_text_config().vocab_size
        tokens = _tokens(config, generator)
        # A classifier without a padding token takes one sequence at a time.
        alone = type(model).__name__.endswith("ForSequenceClassification")
        batches = [{"input_ids": part} for part in tokens.split(1 if alone else len(tokens))]
        if tokenizer is not None:
            text = tokenizer(PROBE_TEXT, return_tensors="pt")["input_ids"]
            batches.append({"input_ids": text.clamp(max=vocab_size - 1)})
    else:
        raise ValueError(
            f"{type(model).__name__} takes {main_input!r}; only models for tokens, pixels or "
            "log-mel features can be verified. Go without: `verify=False` (--no_verify)."
        )
    for batch in batches:
        if getattr(config, "is_encoder_decoder", False) and "input_ids" in batch:
            batch["decoder_input_ids"] = batch["input_ids"]
        if hasattr(model, "logit_scale"):  # compares texts with images
            batch["pixel_values"] = _pixels(config.vision_config, generator)
    return batches


def _tokens(config: Any, generator: torch.Generator) -> Tensor:
    shape, vocab_size = (_NUM_SEQUENCES, _NUM_TOKENS), config.get_text_config().vocab_size
    return torch.randint(vocab_size, shape, generator=generator, device="cpu")


def _pixels(config: Any, generator: torch.Generator) -> Tensor:
    size = getattr(config, "image_size", 64)  # a purely convolutional network has no size
    height, width = (size, size) if isinstance(size, int) else size
    shape = (_NUM_SEQUENCES, config.num_channels, height, width)
    return torch.randn(shape, generator=generator, device="cpu")


@torch.no_grad()
def run_probe(model: nn.Module, inputs: list[dict[str, Tensor]]) -> list[Tensor]:
    """Return a model's outputs in float32 on the CPU: logits, or hidden states without a head."""
    with resident(model):  # to the bit what a merge computes
        return [_outputs(model, batch) for batch in inputs]


def _outputs(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    parameter = next(model.parameters())
    moved = {
        name: value.to(parameter.device, parameter.dtype if value.is_floating_point() else None)
        for name, value in batch.items()
    }
    del parameter
    result = model(**moved)
    logits = result.get("logits")
    outputs: Tensor = result[0] if logits is None else logits
    return outputs.float().cpu()


def output_error(reference: list[Tensor], candidate: list[Tensor]) -> OutputError:
    """Measure the largest difference over all probes."""
    pairs = list(zip(reference, candidate, strict=True))
    absolute = max(float((a - b).abs().max()) for a, b in pairs)
    return OutputError(
        max_absolute=absolute, max_relative=absolute / max(output_size(reference), 1e-30)
    )


def output_size(outputs: list[Tensor]) -> float:
    """Return the largest absolute output of all probes."""
    return max(float(output.abs().max()) for output in outputs)


def check_outputs(
    error: OutputError, limit: float, effect: float, *, whose: str, dtype: str, fix: str
) -> float:
    """Refuse outputs that are not those of the adapter; return the largest difference allowed.

    Args:
        error: How far they are from the adapter's.
        limit: What rounding to `dtype` explains, absolutely; infinite where nobody knows.
        effect: Largest absolute change of the outputs by the adapter, of which half is allowed at
            most; 0 where it changes nothing.
        whose: Begins the message.
        dtype: What was rounded to.
        fix: Ends the message where rounding takes too much of the adapter away.
    """
    found = f"{whose} outputs differ from the adapter's by {error.max_absolute:.1e}"
    # Both written so that NaN fails.
    if not error.max_absolute <= limit:
        raise ValueError(
            f"{found} ({error.max_relative:.1e} of their size), and rounding to {dtype} explains "
            f"{limit:.1e} at most; nothing was written. Another package may have changed PEFT or "
            "transformers: compare with a fresh environment."
        )
    if effect and not error.max_absolute <= effect / 2:
        raise ValueError(
            f"{found} by rounding to {dtype}, more than half of what the adapter changes "
            f"({effect:.1e}); nothing was written. {fix}"
        )
    return min(limit, effect / 2) if effect else limit
