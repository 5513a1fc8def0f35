"""What a language model forgets: its loss on general text, which no run trains on.

The text is that of Python's own language reference and manual, in every installation of Python
(`pydoc_data.topics`, PSF licence): English prose with some code, far from chats.
"""

from typing import Any

import torch
from torch import Tensor, nn

ROW_TOKENS = 256
_ROWS_PER_BATCH = 4


def general_rows(tokenizer: Any, num_tokens: int) -> Tensor:
    """Return rows of general text, (num_tokens / 256, 256), from evenly spaced places.

    Args:
        tokenizer: The model's.
        num_tokens: Rounded up to whole rows.

    Raises:
        ValueError: If the text is shorter.
    """
    from pydoc_data.topics import topics

    text = "\n\n".join(topics[name] for name in sorted(topics))
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    num_rows = -(-num_tokens // ROW_TOKENS)
    if len(ids) < num_rows * ROW_TOKENS:
        raise ValueError(
            f"`forgetting_tokens` ({num_tokens}) must be at most {len(ids)}, the length of the "
            "text; lower it."
        )
    starts = [place * (len(ids) - ROW_TOKENS) // max(num_rows - 1, 1) for place in range(num_rows)]
    return torch.tensor([ids[start : start + ROW_TOKENS] for start in starts])


@torch.no_grad()
def text_loss(model: nn.Module, rows: Tensor, *, bf16: bool) -> float:
    """Return the mean loss per token.

    Args:
        model: A causal language model, in any mode; it is left in it.
        rows: (B, T) token ids.
        bf16: Whether to compute in bfloat16 mixed precision, as the runs do.
    """
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    total = 0.0
    with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
        for batch in rows.to(device).split(_ROWS_PER_BATCH):
            total += float(model(input_ids=batch, labels=batch).loss) * len(batch)
    model.train(was_training)
    return total / len(rows)
