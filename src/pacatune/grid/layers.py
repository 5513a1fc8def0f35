"""Layers whose weights stay in the blocks of their file, and are decoded for one product.

A packed weight is (O, bytes) uint8 in the order of the model's rows. What it is decoded to are the
numbers that a dequantised model holds: of float32 values those nearest in the model's dtype. So a
model computes the same whether it was loaded in blocks or dequantised. At most one decoded weight
is alive at a time.
"""

import copy
import functools
from typing import Any, cast

import torch
from torch import Tensor, nn

from pacatune.grid.decoding import decode
from pacatune.grid.formats import Grid
from pacatune.ops.quantized import decoded_linear


class PackedLayer(nn.Module):
    """A layer with a frozen (O, I) weight in blocks."""

    blocks: nn.Parameter
    """(O, bytes) uint8."""
    scales: nn.Parameter | None
    """Of formats whose blocks do not hold them, (O / a, I / b) float32: of a x b elements each."""
    grid: Grid
    """Their format."""
    dtype: torch.dtype
    """What the weight is decoded to: the dtype of a dequantised model."""

    def pack(
        self, rows: Tensor, grid: Grid, dtype: torch.dtype, scales: Tensor | None = None
    ) -> None:
        """Set these."""
        self.grid, self.dtype = grid, dtype
        self.blocks = nn.Parameter(rows, requires_grad=False)
        own = None if scales is None else nn.Parameter(scales, requires_grad=False)
        self.register_parameter("scales", own)

    @property
    def shape(self) -> tuple[int, int]:
        """(O, I)."""
        num_rows, num_bytes = self.blocks.shape
        return num_rows, num_bytes // self.grid.block_bytes * self.grid.block

    @property
    def weight(self) -> Tensor:
        """The (O, I) weight, decoded anew each time."""
        return self.decoded()

    def decoded(self, rows: Tensor | None = None) -> Tensor:
        """Return the weight as a new tensor, or the (N, I) of these (N,) rows."""
        blocks: Tensor = self.blocks
        scales: Tensor | None = self.scales
        if rows is not None:
            blocks = blocks[rows]
            scales = None if scales is None else scales[rows // (self.shape[0] // len(scales))]
        return decode(self.grid, blocks, self.dtype, scales)


class PackedLinear(PackedLayer, nn.Linear):  # type: ignore[override, unused-ignore]
    """A linear layer with a frozen weight in blocks.

    Args:
        bias: (O,), frozen.
        *packed: As `pack` takes it.
    """

    def __init__(self, bias: Tensor | None, *packed: Any) -> None:
        nn.Module.__init__(self)
        self.pack(*packed)
        self.out_features, self.in_features = self.shape
        own = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self.register_parameter("bias", own)

    def forward(self, x: Tensor) -> Tensor:
        """Apply it to (..., I); keeps nothing for backward."""
        return decoded_linear(x, self.decoded, self.bias)

    def extra_repr(self) -> str:
        """Name sizes and format."""
        return f"{super().extra_repr()}, {self.grid.name}"


class PackedEmbedding(PackedLayer, nn.Embedding):  # type: ignore[override, unused-ignore]
    """An embedding in blocks: the rows that are looked up are decoded."""

    plain_class: type[nn.Embedding] = nn.Embedding

    @classmethod
    def of(cls, embedding: nn.Embedding, *packed: Any) -> "PackedEmbedding":
        """Return an embedding with the weight that `pack` takes, in place of its own."""
        layer: Any = copy.copy(embedding)
        layer._parameters = {}
        layer.__class__ = _packed_class(cast(Any, type(embedding)))
        layer.pack(*packed)
        return cast(PackedEmbedding, layer)

    def forward(self, ids: Tensor) -> Tensor:
        """Return (..., D) of ids, as the embedding's own class makes it of rows."""
        layer: Any = copy.copy(self)  # of this call: other threads have their own
        layer.__class__ = self.plain_class
        layer._parameters = {"weight": self.decoded(ids.flatten())}
        layer.padding_idx = None
        places = torch.arange(ids.numel(), device=ids.device).view(ids.shape)
        y: Tensor = layer(places)
        return y

    def extra_repr(self) -> str:
        """Name sizes and format."""
        return f"{super().extra_repr()}, {self.grid.name}"


@functools.cache
def _packed_class(kind: Any) -> type[PackedEmbedding]:
    return type(f"Packed{kind.__name__}", (PackedEmbedding, kind), {"plain_class": kind})
