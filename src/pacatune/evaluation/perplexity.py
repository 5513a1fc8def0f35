"""Perplexity and bits per byte of text, by windows that overlap."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence

from pacatune.evaluation.scoring import batches, last_logits

_MAX_WINDOW = 1024


@dataclass(frozen=True, kw_only=True)
class TextScore:
    """How well a model predicts texts."""

    loss: float
    """Mean negative log-likelihood of a token, in nats."""
    loss_stderr: float | None
    """Standard error of `loss`, from windows; None where there is one window."""
    num_tokens: int
    """Tokens that were predicted."""
    num_bytes: int
    """UTF-8 bytes of the text that those tokens spell."""

    @property
    def perplexity(self) -> float:
        """Return exp(loss). It depends on the tokenizer; bits per byte do not."""
        return math.exp(self.loss)

    @property
    def bits_per_byte(self) -> float:
        """Return loss * num_tokens / (ln 2 * num_bytes)."""
        return self.loss * self.num_tokens / (math.log(2) * self.num_bytes)


_Window = tuple[list[int], int]
"""Tokens that a model reads at once, and the number of the last ones, on which it is scored."""


def evaluate_perplexity(
    model: Any,
    tokenizer: Any,
    texts: Mapping[str, str],
    *,
    window: int | None = None,
    stride: int | None = None,
    max_tokens: int | None = None,
    batch_size: int = 8,
    progress: bool = False,
) -> dict[str, TextScore]:
    """Score a model on texts, each token once, with at least `window - stride` tokens before it.

    The windows of a text are `window` tokens long and start `stride` apart; the first `stride`
    tokens of a text have less before them. A text begins with the BOS token if the tokenizer puts
    it there; else its first token, which nothing predicts, is left out, and so are its bytes.

    Args:
        model: A causal language model, or a PEFT model around one; put into evaluation mode.
        tokenizer: Its tokenizer.
        texts: Name -> text.
        window: Tokens that are read at once; None takes 1024, or the model's context if less.
        stride: Tokens from one window to the next; None takes half of `window`. With `window - 1`,
            windows share one token only, which is fastest.
        max_tokens: Tokens of each text at most, the first ones.
        batch_size: Windows that are evaluated at once.
        progress: Whether to show a bar.

    Returns:
        Name -> score, and `all` for all texts together where there are several.

    Raises:
        ValueError: If a text has fewer than two tokens, or `window` and `stride` do not fit.
    """
    window, stride = _sizes(model, window, stride, batch_size)
    model.eval()
    parts: dict[str, list[tuple[float, int]]] = {}
    num_bytes: dict[str, int] = {}
    for name, text in texts.items():
        ids, num_bytes[name] = _encode(tokenizer, text, max_tokens)
        if len(ids) < 2:
            raise ValueError(f"{name} has {len(ids)} tokens; a text needs two, one to predict.")
        windows = list(_windows(ids, window, stride))
        parts[name] = _score(model, windows, batch_size, name if progress else None)
    scores = {name: _total(part, num_bytes[name]) for name, part in parts.items()}
    if len(scores) > 1:
        together = [each for part in parts.values() for each in part]
        scores["all"] = _total(together, sum(num_bytes.values()))
    return scores


def default_text() -> dict[str, str]:
    """Return a text that every Python has: its reference manual, as the console's help shows it."""
    from pydoc_data.topics import topics

    return {"pydoc_data.topics": "\n\n".join(text for _, text in sorted(topics.items()))}


def _sizes(model: Any, window: int | None, stride: int | None, batch_size: int) -> tuple[int, int]:
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    longest = context or _MAX_WINDOW
    window = min(_MAX_WINDOW, longest) if window is None else window
    if not 2 <= window <= (context or window):
        raise ValueError(f"`window` ({window}) must be in [2, {longest}], the model's context.")
    stride = window // 2 if stride is None else stride
    if not 1 <= stride < window:
        raise ValueError(f"`stride` ({stride}) must be in [1, window - 1 = {window - 1}].")
    if batch_size < 1:
        raise ValueError(f"`batch_size` ({batch_size}) must be at least 1.")
    return window, stride


def _encode(tokenizer: Any, text: str, max_tokens: int | None) -> tuple[list[int], int]:
    """Return token ids and the number of bytes that the predicted ones spell."""
    ids: list[int] = tokenizer(text, verbose=False)["input_ids"]
    while ids and ids[-1] == tokenizer.eos_token_id:
        ids.pop()  # Some tokenizers end each text.
    starts = (
        bool(ids)
        and ids[0] == tokenizer.bos_token_id
        and not text.startswith(str(tokenizer.bos_token))
    )
    whole = max_tokens is None or len(ids) <= max_tokens
    ids = ids[:max_tokens]
    # Decoding is lossless for a whole text only; what is cut off or left out is decoded instead.
    decode = partial(tokenizer.decode, clean_up_tokenization_spaces=False)
    spelt = text if whole else decode(ids[starts:])
    unscored = "" if starts else decode(ids[:1])
    return ids, len(spelt.encode()) - len(unscored.encode())


def _windows(ids: list[int], window: int, stride: int) -> Iterator[_Window]:
    scored = 1  # the first token has nothing before it
    for start in range(0, len(ids), stride):
        end = min(start + window, len(ids))
        if end > scored:
            yield ids[start:end], end - scored
            scored = end
        if end == len(ids):
            return


def _score(
    model: Any, windows: list[_Window], batch_size: int, title: str | None
) -> list[tuple[float, int]]:
    """Return the summed loss and the number of tokens of each window."""
    results = []
    for batch in batches(windows, batch_size, title):
        rows = [torch.tensor(tokens, device=model.device) for tokens, _ in batch]
        ids = pad_sequence(rows, batch_first=True)
        mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
        first = min(len(tokens) - num_scored - 1 for tokens, num_scored in batch)
        logits = last_logits(model, ids.shape[1] - first, input_ids=ids, attention_mask=mask)
        for row, (tokens, num_scored) in enumerate(batch):
            end = len(tokens)
            targets = ids[row, end - num_scored : end]
            predicted = logits[row, end - num_scored - 1 - first : end - 1 - first].float()
            loss = functional.cross_entropy(predicted, targets, reduction="sum")
            results.append((float(loss), num_scored))
    return results


def _total(parts: list[tuple[float, int]], num_bytes: int) -> TextScore:
    num_tokens = sum(num for _, num in parts)
    loss = sum(total for total, _ in parts) / num_tokens
    stderr = None
    if len(parts) > 1:
        # `loss` is a ratio of sums over windows; tokens of one are not independent.
        residuals = sum((total - loss * num) ** 2 for total, num in parts)
        stderr = math.sqrt(residuals * len(parts) / (len(parts) - 1)) / num_tokens
    return TextScore(loss=loss, loss_stderr=stderr, num_tokens=num_tokens, num_bytes=num_bytes)
