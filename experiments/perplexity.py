"""The loss of a language model on general text, by windows that overlap."""

from typing import Any

import torch

_WINDOW = 1024


def general_text() -> str:
    """Return a text that every Python has: its reference manual, as the console's help shows it."""
    from pydoc_data.topics import topics

    return "\n\n".join(text for _, text in sorted(topics.items()))


@torch.no_grad()
def text_loss(model: Any, tokenizer: Any, text: str, max_tokens: int) -> float:
    """Return the mean loss of a text's first tokens, in nats.

    Each token is predicted once, from at least half a window before it but for the first ones.
    """
    ids = torch.tensor([tokenizer(text, verbose=False)["input_ids"][:max_tokens]])
    length = ids.shape[1]
    if length < 2:
        raise ValueError(f"{length} tokens are too few: nothing predicts the first; give two.")
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    window = min(_WINDOW, context or _WINDOW)
    model.eval()
    total, scored = 0.0, 1
    for start in range(0, length, window // 2):
        end = min(start + window, length)
        if end > scored:
            part = ids[:, start:end].to(model.device)
            labels = part.clone()
            labels[:, : scored - start] = -100
            total += model(input_ids=part, labels=labels).loss.item() * (end - scored)
            scored = end
    return total / (length - 1)
