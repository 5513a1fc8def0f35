"""A model folder whose matrices are codes: safetensors of FP8, or of packed 4-bit integers.

FP8 as DeepSeek saves it (`weight`, and `weight_scale_inv` of blocks of 128 x 128), FP8 and INT4 as
compressed-tensors does (`weight` or `weight_packed`, and `weight_scale` of rows or groups).
"""

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from pacatune.grid.checkpoint import PackedCheckpoint

_PACKED = "_packed"
_SCALES = ("weight_scale_inv", "weight_scale")
# What makes codes mean something else.
_UNKNOWN = ("weight_zero_point", "weight_g_idx", "weight_global_scale")


@dataclass(frozen=True, kw_only=True)
class PackedFolder(PackedCheckpoint):
    """The tensors of a model folder. Packed weights have the shape of what they hold."""

    @classmethod
    def open(cls, folder: str | Path, *, half_edited: bool = False) -> "PackedFolder":
        """Read the headers of a folder's files; see `Checkpoint.open`."""
        checkpoint = super().open(folder, half_edited=half_edited)
        entries = dict(checkpoint.entries)
        for name, entry in entries.items():
            shape = name.removesuffix(_PACKED) + "_shape"
            is_packed = name.endswith(_PACKED) and entry.dtype == "I32" and len(entry.shape) == 2
            if not is_packed or shape not in entries or entries[shape].shape != (2,):
                continue
            # Of eight codes in each integer; with other numbers of bits it keeps its own dtype.
            sizes = entry.shape[0], 8 * entry.shape[1]
            if checkpoint.tensor(shape).tolist() == [*sizes]:
                entries[name] = replace(entry, dtype="INT4", shape=sizes)
        return cls(folder=checkpoint.folder, files=checkpoint.files, entries=entries)

    def name_of(self, parameter: str, num_blocks: int) -> str:
        """Return the name of a parameter's codes, which is its own, or that with `_packed`."""
        for name in (parameter, parameter + _PACKED):
            if name in self.entries:
                return name
        raise ValueError(f"{self.folder} has no tensor {parameter!r}; it is another model.")

    def rows(self, name: str) -> Tensor:
        """Return (O, bytes) uint8, the rows of a quantised matrix."""
        return self.tensor(name).view(torch.uint8)

    def scale_of(self, name: str) -> Tensor:
        """Return the (O / a, I / b) float32 scales of a x b elements.

        Raises:
            ValueError: If there are none, or they do not divide the matrix evenly.
        """
        module = name.rpartition(".")[0]
        ends = (*_SCALES, *_UNKNOWN)
        own = [f"{module}.{end}" for end in ends if f"{module}.{end}" in self.entries]
        if len(own) != 1 or own[0].rpartition(".")[2] in _UNKNOWN:
            raise ValueError(
                f"{self.folder} holds {name!r} with {', '.join(own) or 'no scale'}; codes can be "
                f"trained where there is {' or '.join(_SCALES)} alone. Leave it out of the targets."
            )
        scale = self.tensor(own[0]).float()
        scale = scale.reshape(-1, scale.shape[-1] if scale.ndim > 1 else 1)
        shape = self.entries[name].shape
        if not scale.numel() or shape[0] % scale.shape[0] or shape[1] % scale.shape[1]:
            raise ValueError(
                f"{self.folder} has a scale {own[0]!r} of {tuple(scale.shape)}, which does not "
                f"divide the weight, {shape}, evenly; leave it out of the targets."
            )
        return scale

    def scales(self, name: str, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Return scales of columns, and minima of 0, both (O, R) float32."""
        scale, shape = self.scale_of(name), self.entries[name].shape
        by_column = scale[:, indices // (shape[1] // scale.shape[1])]
        scales = by_column.repeat_interleave(shape[0] // scale.shape[0], dim=0)
        return scales, torch.zeros_like(scales)
