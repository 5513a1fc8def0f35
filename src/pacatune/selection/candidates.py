"""Candidates for better columns than random ones, beyond those of the paper.

    gradient_activation    the largest ||dW[:, i]|| ||x[:, i]||
    activation_qr          pivoted QR: each time the column with the most that the ones before miss
    activation_leverage    the largest leverage scores of the r first principal directions

The last two look at what columns have in common: of two inputs that always move together, one is
enough. Both work on a sketch S (256, I) of the inputs X (N, I), whose products S^T S are those of
X^T X up to random errors of about 1/16 of the norms, in place of a matrix (I, I) or all inputs.

Source: pivoted QR for column subsets, Golub 1965; leverage scores, Mahoney and Drineas 2009.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from pacatune.selection.strategies import SKETCH_ROWS, largest, register_strategy

__all__: list[str] = []


@register_strategy("gradient_activation", needs=("gradient", "activation"))
def select_gradient_activation(
    weight: Tensor, statistics: Mapping[str, Tensor], rank: int, generator: torch.Generator
) -> Tensor:
    """Choose the columns of the largest product of both norms."""
    return largest(statistics["gradient"].sqrt() * statistics["activation"].sqrt(), rank)


@register_strategy("activation_qr", needs=("activation_sketch",))
def select_activation_qr(
    weight: Tensor, statistics: Mapping[str, Tensor], rank: int, generator: torch.Generator
) -> Tensor:
    """Choose columns by QR with pivoting: each adds the most to the span of those before.

    Costs 4 * 256 * I * rank operations.

    Raises:
        ValueError: If more columns are wanted than the sketch can tell apart.
    """
    sketch = statistics["activation_sketch"]
    _check_rank("activation_qr", rank, sketch)
    residual = sketch.double()
    chosen: list[int] = []
    for _ in range(rank):
        norms = torch.linalg.vector_norm(residual, dim=0)
        norms[chosen] = -1.0
        best = int(norms.argmax())
        chosen.append(best)
        direction = residual[:, best] / norms[best].clamp_min(torch.finfo(torch.float64).tiny)
        residual = residual - torch.outer(direction, direction @ residual)
    return torch.tensor(chosen)


@register_strategy("activation_leverage", needs=("activation_sketch",))
def select_activation_leverage(
    weight: Tensor, statistics: Mapping[str, Tensor], rank: int, generator: torch.Generator
) -> Tensor:
    """Choose the columns that the `rank` principal directions of the inputs lean on most.

    Raises:
        ValueError: If more columns are wanted than the sketch can tell apart.
    """
    sketch = statistics["activation_sketch"]
    _check_rank("activation_leverage", rank, sketch)
    directions = torch.linalg.svd(sketch.double(), full_matrices=False).Vh[:rank]
    return largest(directions.square().sum(0), rank)


def _check_rank(name: str, rank: int, sketch: Tensor) -> None:
    most = min(sketch.shape)
    if rank > most:
        raise ValueError(
            f"`selection` ({name!r}) tells at most {most} columns apart (the sketch has "
            f"{SKETCH_ROWS} rows), and the rank is {rank}; lower it, or choose by 'activation'."
        )
