"""Answer several prompts at once, each with its own temperature and its own seed.

A row's choice depends on its own logits and its own generator only, so the other rows of a batch
change it by no more than rounding does. Sampling adds Gumbel noise to the scaled logits and takes
the largest, which draws from their softmax.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from torch import Tensor
from transformers import LogitsProcessor, PreTrainedTokenizerBase, TopPLogitsWarper

from pacatune.residency import resident

if TYPE_CHECKING:
    from pacatune.adapters.generation import Sampling

__all__ = ["Generated", "generate_batch"]


@dataclass(frozen=True, kw_only=True)
class Generated:
    """One answer of a batch."""

    text: str
    num_tokens: int
    """Without the token that ends it."""
    finish_reason: Literal["stop", "length"]
    """`length`: the answer is as long as it may be, so it may have been cut off."""


def generate_batch(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Tensor],
    samplings: Sequence["Sampling"],
    *,
    eos_token_id: list[int] | None,
    pad_token_id: int,
) -> list[Generated]:
    """Generate an answer to each prompt.

    Args:
        model: Generates by transformers' `generate`.
        tokenizer: Decodes.
        prompts: (1, T) tokens each, of any lengths.
        samplings: How to choose, one for each prompt; `max_new_tokens` must be the same for all.
        eos_token_id: Tokens that end an answer.
        pad_token_id: Fills up the shorter prompts, on the left.

    Raises:
        ValueError: If `max_new_tokens` differs.
    """
    lengths = {one.max_new_tokens for one in samplings}
    if len(lengths) != 1 or len(prompts) != len(samplings):
        raise ValueError(
            f"`samplings` ({len(samplings)}, with `max_new_tokens` {sorted(lengths)}) must be one "
            f"for each of {len(prompts)} prompts and have one length; make several batches."
        )
    tokens, mask = _padded(prompts, pad_token_id)
    with torch.no_grad(), resident(model):
        output = model.generate(
            input_ids=tokens.to(model.device),
            attention_mask=mask.to(model.device),
            max_new_tokens=lengths.pop(),
            eos_token_id=eos_token_id,
            pad_token_id=pad_token_id,
            logits_processor=[_SeededChoice(samplings)],
            do_sample=False,
            temperature=None,
            top_p=None,
            top_k=None,
        )
    answers = output[:, tokens.shape[1] :].tolist()
    return [_cut(tokenizer, answer, eos_token_id or []) for answer in answers]


class _SeededChoice(LogitsProcessor):  # type: ignore[misc]  # transformers is not followed
    """Turns the largest score into a sample, in the rows that have a temperature."""

    def __init__(self, samplings: Sequence["Sampling"]) -> None:
        self._rows = [
            # On the CPU, so that a seed means the same on every device.
            (row, sampling, torch.Generator().manual_seed(sampling.seed))
            for row, sampling in enumerate(samplings)
            if sampling.temperature > 0
        ]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return scores (B, V) whose largest is the token to take."""
        scores = scores.float().clone()
        for row, sampling, generator in self._rows:
            scaled = scores[row : row + 1] / sampling.temperature
            if sampling.top_p < 1:
                scaled = cast(Tensor, TopPLogitsWarper(sampling.top_p)(input_ids, scaled))
            noise = torch.empty(scaled.shape[1]).exponential_(generator=generator).log()
            scores[row] = scaled[0] - noise.to(scaled.device)
        return scores


def _padded(prompts: Sequence[Tensor], pad: int) -> tuple[Tensor, Tensor]:
    """Return tokens and mask (B, T) of prompts (1, T) that end together."""
    longest = max(prompt.shape[1] for prompt in prompts)
    tokens = torch.full((len(prompts), longest), pad)
    mask = torch.zeros_like(tokens)
    for row, prompt in enumerate(prompts):
        start = longest - prompt.shape[1]
        tokens[row, start:] = prompt[0]
        mask[row, start:] = 1
    return tokens, mask


def _cut(tokenizer: PreTrainedTokenizerBase, answer: list[int], stops: list[int]) -> Generated:
    end = next((place for place, token in enumerate(answer) if token in stops), None)
    kept = answer[:end]
    return Generated(
        text=cast(str, tokenizer.decode(kept, skip_special_tokens=True)),
        num_tokens=len(kept),
        finish_reason="length" if end is None else "stop",
    )
