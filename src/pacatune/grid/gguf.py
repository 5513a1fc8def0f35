"""A GGUF file as a checkpoint: its tensors, and the columns of those whose format is a grid.

The file is mapped, never loaded. Its header is read by the package gguf, and its tensors have the
names that llama.cpp gives them.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pacatune.files.checkpoint import DTYPES, Checkpoint, Entry
from pacatune.files.journal import file_path, refuse_half_edited
from pacatune.files.json_file import check_strings
from pacatune.grid.formats import GRIDS, Grid
from pacatune.installation import require_extra


@dataclass(frozen=True, kw_only=True)
class GgufCheckpoint(Checkpoint):
    """The tensors of a GGUF file. Columns of quantised ones are (O, R) uint8 codes."""

    architecture: str
    """As the file says it, such as `llama`."""

    @classmethod
    def open(cls, folder: str | Path, *, half_edited: bool = False) -> "GgufCheckpoint":
        """Read the header of a file.

        Args:
            folder: The file.
            half_edited: Take it under its parked name too, where an edit was interrupted.

        Raises:
            FileNotFoundError: If there is none.
            ValueError: If it is damaged, one of several, or being edited.
        """
        require_extra("a GGUF file", "gguf", ("gguf",))
        file = Path(folder)
        if not half_edited:
            refuse_half_edited(file)
        path = file_path(file.parent, file.name)
        if not path.is_file():
            raise FileNotFoundError(f"{file} does not exist, or is no file.")
        reader = _read(path)
        fields = {
            name: field.contents() for name, field in reader.fields.items() if _is_short(field)
        }
        if int(fields.get("split.count", 1)) > 1:
            raise ValueError(
                f"{file} is one of several files of a model; join them by `llama-gguf-split "
                "--merge`."
            )
        check_strings([tensor.name for tensor in reader.tensors], f"the header of {file}")
        entries = {
            tensor.name: Entry(
                file=file.name,
                dtype=tensor.tensor_type.name,
                shape=tuple(int(size) for size in reversed(tensor.shape.tolist())),
                start=int(tensor.data_offset),
                num_bytes=int(tensor.n_bytes),
            )
            for tensor in reader.tensors
        }
        size = path.stat().st_size
        for name, entry in entries.items():
            if entry.start + entry.num_bytes > size:
                raise ValueError(f"{file} ends within {name!r}; it is damaged. Copy it again.")
        architecture = str(fields.get("general.architecture", ""))
        return cls(
            folder=file.parent, files=(file.name,), entries=entries, architecture=architecture
        )

    @property
    def path(self) -> Path:
        """The file, under the name that it has now."""
        return file_path(self.folder, self.files[0])

    def grid(self, name: str) -> Grid | None:
        """Return the grid of a tensor; None if it holds plain numbers.

        Raises:
            ValueError: If it is of another format.
        """
        kind = self.entries[name].dtype
        if kind in DTYPES:
            return None
        if kind not in GRIDS:
            raise ValueError(
                f"{self.folder / self.files[0]} holds {name!r} as {kind}, whose codes cannot be "
                f"trained; formats are {', '.join((*GRIDS, *DTYPES))}. Leave it out of the "
                "targets, or take a file in one of these."
            )
        return GRIDS[kind]

    def tensor(self, name: str) -> Tensor:
        """Return a tensor of plain numbers."""
        entry = self.entries[name]
        return self._bytes(entry).view(DTYPES[entry.dtype]).view(entry.shape)

    def rows(self, name: str) -> Tensor:
        """Return (O, bytes) uint8, the rows of a quantised matrix, in the file's order."""
        entry = self.entries[name]
        return self._bytes(entry).view(entry.shape[0], -1)

    def columns(self, name: str, dim: int, indices: Tensor) -> Tensor:
        """Return columns; of a quantised matrix their codes."""
        if (grid := self.grid(name)) is None:
            return super().columns(name, dim, indices)
        return grid.codes(self.rows(name), indices)

    def put_columns_(
        self, memory: Any, name: str, dim: int, indices: Tensor, columns: Tensor
    ) -> None:
        """Write columns, or their codes, into the mapped file."""
        if (grid := self.grid(name)) is None:
            super().put_columns_(memory, name, dim, indices, columns)
            return
        entry = self.entries[name]
        flat = torch.frombuffer(
            memory, dtype=torch.uint8, count=entry.num_bytes, offset=entry.start
        )
        grid.put_codes_(flat.view(entry.shape[0], -1), indices, columns)

    def touched(self, name: str, dim: int, indices: Tensor, step: int) -> Tensor:
        """Return the places of all bytes in the file that columns lie in."""
        if (grid := self.grid(name)) is None:
            return super().touched(name, dim, indices, step)
        entry = self.entries[name]
        starts = entry.start + torch.arange(entry.shape[0]) * grid.row_bytes(entry.shape[1])
        bytes_ = torch.cat([byte for byte, _ in grid.byte_places(indices)])
        return (starts[:, None] + bytes_).flatten()

    def _bytes(self, entry: Entry) -> Tensor:
        if entry.file not in self._opened:
            path = self.path
            self._opened[entry.file] = torch.from_file(
                str(path), shared=False, size=path.stat().st_size, dtype=torch.uint8
            )
        flat: Tensor = self._opened[entry.file]
        return flat[entry.start : entry.start + entry.num_bytes]


def _read(path: Path) -> Any:
    from gguf import GGUFReader

    try:
        reader = GGUFReader(path, "r")
    except Exception as error:  # whatever a damaged header makes it raise
        raise ValueError(
            f"{path} is no GGUF file that can be read ({type(error).__name__}: {error}); copy it "
            "again."
        ) from error
    if reader.byte_order != "I":
        raise ValueError(f"{path} has the bytes of its numbers in the other order; convert it.")
    return reader


def _is_short(field: Any) -> bool:
    """Whether a field of the header is one value: lists have a token each."""
    return len(field.data) == 1 and len(field.types) == 1


def name_of(checkpoint: GgufCheckpoint, parameter: str, num_blocks: int) -> str:
    """Return the name of a parameter of transformers in a file.

    Raises:
        ValueError: If the file has no such tensor, or the package gguf does not know the model.
    """
    import gguf

    kinds = {name: arch for arch, name in gguf.MODEL_ARCH_NAMES.items()}
    file = checkpoint.folder / checkpoint.files[0]
    if checkpoint.architecture not in kinds:
        raise ValueError(
            f"{file} is of the architecture {checkpoint.architecture!r}, which the package gguf "
            "does not know; upgrade it."
        )
    names = gguf.get_tensor_name_map(kinds[checkpoint.architecture], num_blocks)
    name = names.get_name(parameter, try_suffixes=(".weight", ".bias"))
    if name not in checkpoint.entries:
        raise ValueError(
            f"{file} has no tensor of its own for {parameter!r}; leave it out of the targets."
        )
    return str(name)


def row_order(values: Tensor, weight: Tensor, heads: tuple[int, ...], name: str) -> Tensor:
    """Return which row of a weight each row of the file is, (O,) int64.

    llama.cpp lays the rows of some projections otherwise: of each head, the two halves that are
    rotated together alternate. Values decide, so it is also a check that the weight is the file's.

    Args:
        values: (O, R) values of some columns in the file.
        weight: The same columns of the model's weight, in its dtype.
        heads: Numbers of heads that a weight may have.
        name: What the weight is called, for messages.
    """
    rows = torch.arange(len(weight))
    halves = [
        rows.view(number, 2, -1).transpose(1, 2).flatten()
        for number in heads
        if len(weight) % (2 * number) == 0
    ]
    rounded = values.to(weight.dtype)
    for order in (rows, *halves):
        if torch.equal(weight[order], rounded):
            return order
    raise ValueError(
        f"the file does not hold {name!r} as the model has it; it is another model's, or its rows "
        "are laid in an order that is not known here."
    )
