"""Layers whose weights stay in the blocks of their file, and are decoded for one product.

A packed weight is (O, bytes) uint8 in the order of the model's rows. What it is decoded to are the
numbers that a dequantised model holds: of float32 values those nearest in the model's dtype. So a
model computes the same whether it was loaded in blocks or dequantised. At most one decoded weight
is alive at a time.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from pacatune.grid.formats import Grid
from pacatune.ops.quantized import decoded_linear


def decoded(grid: Grid, rows: Tensor) -> Tensor:
    """Return the (O, I) float32 values of (O, bytes) rows, bit for bit those of `Grid.values`."""
    blocks = rows.reshape(-1, grid.block_bytes)
    if (decode := _transformers_decoder(grid.name)) is not None:
        return decode(blocks).view(len(rows), -1)
    assert grid.steps is not None, "its scales are not in its blocks"
    elements = torch.arange(grid.block, device=rows.device)
    by_element = blocks[:, None].expand(-1, grid.block, -1)
    values = grid.values(grid.codes(blocks, elements), *grid.steps(by_element, elements))
    return values.view(len(rows), -1)


@functools.cache
def _transformers_decoder(name: str) -> Callable[[Tensor], Tensor] | None:
    """Return transformers' decoder of blocks, which is faster; None where it has none."""
    try:
        from transformers.integrations.gguf.dequant import GGML_NAME, dequantize
    except ImportError:
        return None
    for number, known in GGML_NAME.items():
        if known == name:
            return lambda blocks: dequantize(blocks.reshape(-1), number, torch.float32)
    return None


class PackedLinear(nn.Module):
    """A linear layer with a frozen weight in blocks.

    Args:
        rows: (O, bytes) uint8.
        grid: Their format.
        dtype: Of the dequantised model.
        bias: (O,), frozen.
    """

    def __init__(
        self, rows: Tensor, grid: Grid, dtype: torch.dtype, bias: Tensor | None = None
    ) -> None:
        super().__init__()
        self.grid, self.dtype = grid, dtype
        self.out_features = len(rows)
        self.in_features = rows.shape[1] // grid.block_bytes * grid.block
        self.blocks = nn.Parameter(rows, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    def decoded(self, dtype: torch.dtype) -> Tensor:
        """Return the (O, I) weight as a new tensor."""
        return decoded(self.grid, self.blocks).to(self.dtype).to(dtype)

    @property
    def weight(self) -> Tensor:
        """The (O, I) weight, decoded for whoever multiplies with it himself (losses in chunks)."""
        return self.decoded(self.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Apply it to (..., I); keeps nothing for backward."""
        return decoded_linear(x, self.decoded, self.bias)

    def extra_repr(self) -> str:
        """Name sizes and format."""
        return f"in_features={self.in_features}, out_features={self.out_features}, {self.grid.name}"


class PackedEmbedding(nn.Module):
    """An embedding in blocks: the rows that are looked up are decoded."""

    def __init__(self, rows: Tensor, grid: Grid, dtype: torch.dtype, **options: Any) -> None:
        super().__init__()
        self.grid, self.dtype = grid, dtype
        self.num_embeddings = len(rows)
        self.embedding_dim = rows.shape[1] // grid.block_bytes * grid.block
        self.padding_idx: int | None = options.get("padding_idx")
        self.embed_scale: Any = options.get("embed_scale")
        self.blocks = nn.Parameter(rows, requires_grad=False)

    @property
    def weight(self) -> Tensor:
        """The (V, D) weight, decoded."""
        return decoded(self.grid, self.blocks).to(self.dtype)

    def forward(self, ids: Tensor) -> Tensor:
        """Return (..., D) of ids."""
        rows = decoded(self.grid, self.blocks[ids.flatten()]).to(self.dtype)
        y = rows.view(*ids.shape, self.embedding_dim)
        return y if self.embed_scale is None else y * self.embed_scale

    def extra_repr(self) -> str:
        """Name sizes and format."""
        return f"{self.num_embeddings}, {self.embedding_dim}, {self.grid.name}"
