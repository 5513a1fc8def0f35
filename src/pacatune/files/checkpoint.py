"""The tensors of a model folder, where they lie in its safetensors files.

Nothing is loaded: a tensor is a window onto its file. The folder's index (or its one file) says
which files belong to the model; anything else that lies there does not.
"""

import math
import mmap
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from pacatune.files.journal import file_path, refuse_half_edited
from pacatune.files.json_file import check_strings, read_json_object
from pacatune.files.tensor_file import read_layout

SINGLE_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"

_MAX_INDEX_BYTES = 64 * 2**20
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
"""Dtypes of tensors that are plain numbers: others are quantised, or no weights."""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """Where one tensor lies."""

    file: str
    """Name of the file in the folder."""
    dtype: str
    """In safetensors' words, such as `BF16`."""
    shape: tuple[int, ...]
    """Its sizes."""
    start: int
    """Place of its first byte in the file."""
    num_bytes: int
    """Its size in the file."""

    def window(self, memory: mmap.mmap) -> Tensor:
        """Return its bytes in its mapped file."""
        return torch.frombuffer(memory, dtype=torch.uint8, count=self.num_bytes, offset=self.start)


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A model folder's tensors."""

    folder: Path
    """The folder."""
    files: tuple[str, ...]
    """Names of the files with its tensors."""
    entries: dict[str, Entry]
    """Where each tensor lies, by name."""
    _opened: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def open(cls, folder: str | Path, *, half_edited: bool = False) -> "Checkpoint":
        """Read the headers of a model folder's files.

        Args:
            folder: The model folder.
            half_edited: Take files under their parked names too, where an edit was interrupted;
                otherwise such a folder is refused.

        Raises:
            FileNotFoundError: If a file is missing.
            ValueError: If a file is damaged, is not named by a plain name, or being edited.
        """
        folder = Path(folder)
        if not half_edited:
            refuse_half_edited(folder)
        files = _file_names(folder)
        entries: dict[str, Entry] = {}
        for name in files:
            path = file_path(folder, name)
            if not path.is_file():
                raise FileNotFoundError(
                    f"{folder} has no {name}, which its {INDEX_NAME} names; copy it again."
                )
            for key, entry in _read_entries(path, name).items():
                if key in entries:
                    raise ValueError(
                        f"{folder} has tensor {key!r} in {entries[key].file} and in {name}; only "
                        "one of them can be the model's. Save the model again."
                    )
                entries[key] = entry
        return cls(folder=folder, files=files, entries=entries)

    @property
    def title(self) -> str:
        """The path, for messages."""
        return str(self.folder)

    def tensor(self, name: str) -> Tensor:
        """Return a tensor, read from the file as it is looked at."""
        file = self.entries[name].file
        if file not in self._opened:
            self._opened[file] = safe_open(file_path(self.folder, file), framework="pt")
        tensor: Tensor = self._opened[file].get_tensor(name)
        return tensor

    def columns(self, name: str, dim: int, indices: Tensor) -> Tensor:
        """Return some columns of a tensor."""
        return self.tensor(name).index_select(dim, indices)

    def values(self, name: str, dim: int, indices: Tensor) -> Tensor:
        """Return the numbers in some columns of a tensor."""
        return self.columns(name, dim, indices)

    def put_columns_(
        self, memory: mmap.mmap, name: str, dim: int, indices: Tensor, columns: Tensor
    ) -> None:
        """Write columns, in the tensor's dtype, into its mapped file; nothing else changes."""
        entry = self.entries[name]
        new = columns.contiguous().view(torch.uint8).view(*columns.shape, -1)
        entry.window(memory).view(*entry.shape, -1).index_copy_(dim, indices, new)

    def touched(self, name: str, dim: int, indices: Tensor, step: int) -> Tensor:
        """Return places in the file where columns lie, one at least in any `step` bytes of them."""
        entry = self.entries[name]
        shape, itemsize = entry.shape, DTYPES[entry.dtype].itemsize
        # What is together in memory: a column's part of one row.
        length = math.prod(shape[dim + 1 :]) * itemsize
        rows = torch.arange(math.prod(shape[:dim]), device="cpu") * shape[dim]
        starts = entry.start + ((rows[:, None] + indices.cpu()) * length).reshape(-1, 1)
        steps = torch.tensor([*range(0, length, step), length - 1], device="cpu")
        return (starts + steps).flatten()

    @property
    def num_bytes(self) -> int:
        """Size of the files."""
        return sum((self.folder / name).stat().st_size for name in self.files)


def _file_names(folder: Path) -> tuple[str, ...]:
    index = folder / INDEX_NAME
    # transformers takes the one file where both lie.
    is_single = file_path(folder, SINGLE_NAME).is_file()
    if is_single or not index.is_file():
        if not is_single:
            raise FileNotFoundError(
                f"{folder} has neither {SINGLE_NAME} nor {INDEX_NAME}; only models that are saved "
                "as safetensors can be patched: save it with transformers' `save_pretrained`."
            )
        return (SINGLE_NAME,)
    weight_map = read_json_object(index, _MAX_INDEX_BYTES).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index} has no `weight_map`; it is damaged. Copy it again.")
    names = sorted({str(name) for name in weight_map.values()})
    for name in names:
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise ValueError(
                f"{index} names the file {name[:80]!a}; it must be a plain name that ends with "
                ".safetensors."
            )
    return tuple(names)


def _read_entries(path: Path, name: str) -> dict[str, Entry]:
    layout = read_layout(path, max_bytes=None)
    check_strings([*layout.tensors], f"the header of {path}")
    return {
        key: Entry(
            file=name,
            dtype=entry["dtype"],
            shape=tuple(entry["shape"]),
            start=layout.data_start + entry["data_offsets"][0],
            num_bytes=entry["data_offsets"][1] - entry["data_offsets"][0],
        )
        for key, entry in layout.tensors.items()
    }


@contextmanager
def writable(path: Path) -> Iterator[mmap.mmap]:
    """Map a file into memory for writing; what is written is on the disk when the block ends."""
    with path.open("r+b") as file:
        memory = mmap.mmap(file.fileno(), 0)
        yield memory
        memory.flush()
        os.fsync(file.fileno())
        with suppress(BufferError):  # a window is still held somewhere; it goes with that
            memory.close()
