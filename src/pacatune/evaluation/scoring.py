"""What scoring many inputs takes: batches, and the logits that are read but no others."""

from collections.abc import Iterator, Sequence
from inspect import signature
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


def batches(items: Sequence[T], size: int, title: str | None) -> Iterator[Sequence[T]]:
    """Yield `size` items at a time, with a bar on stderr under a title."""
    from rich.console import Console
    from rich.progress import track

    starts, console = range(0, len(items), size), Console(stderr=True)
    for start in track(starts, title or "", console=console, disable=title is None):
        yield items[start : start + size]


@torch.no_grad()
def last_logits(model: Any, num_kept: int, **inputs: Tensor) -> Tensor:
    """Return a causal language model's logits of the last positions, (B, min(T, num_kept), V).

    With a large vocabulary, logits of whole prompts are most of the memory and a good part of
    the time. `inputs` are what the model takes, (B, T) each.
    """
    from pacatune.adapters.fingerprint import unwrap  # which imports PEFT

    if "logits_to_keep" not in signature(unwrap(model).forward).parameters:
        logits: Tensor = model(**inputs).logits
        return logits[:, -num_kept:]
    head = model.get_output_embeddings()
    hook = None if head is None else head.register_forward_pre_hook(_make_contiguous)
    try:
        logits = model(**inputs, logits_to_keep=num_kept).logits
    finally:
        if hook is not None:
            hook.remove()
    return logits


def _make_contiguous(_: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
    # torch multiplies inputs with gaps by a frozen weight batch-wise, with a copy of the weight
    # for each row.
    return tuple(a.contiguous() if isinstance(a, Tensor) else a for a in args)
