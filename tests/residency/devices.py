"""The branches of a GPU, on a CPU."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

from torch import Tensor

from pacatune.residency import put, weight
from pacatune.residency.put import Put


@contextmanager
def as_on_a_gpu() -> Iterator[list[int]]:
    """Behave as on a GPU with Triton; yields a list that gets the size of each launch.

    Numpy changes no weight, so what was read of it is good until its version changes; and the
    columns of several weights go by one launch.
    """
    sizes: list[int] = []

    def exchange(puts: Sequence[Put], *, takes: bool = False) -> None:
        sizes.append(len(puts))
        for one in puts:
            put.keep([one.kept]) if takes else put.put([one])

    def can_exchange(*tensors: Tensor | None) -> bool:
        return all(tensor is None or tensor.is_contiguous() for tensor in tensors)

    branches: list[tuple[Any, str, Any]] = [
        (weight, "_is_numpys", lambda memory: False),
        (put, "can_exchange", can_exchange),
        (put, "exchange", exchange),
    ]
    with ExitStack() as stack:
        for branch in branches:
            stack.enter_context(patch.object(*branch))
        yield sizes
