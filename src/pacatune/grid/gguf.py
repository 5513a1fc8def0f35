"""A GGUF file as a checkpoint: its tensors, and the columns of those whose format is a grid.

The file is mapped, never loaded. Its header is read by the package gguf, and its tensors have the
names that llama.cpp gives them.
"""

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pacatune.files.checkpoint import DTYPES, Entry
from pacatune.files.journal import file_path, refuse_half_edited
from pacatune.files.json_file import check_strings
from pacatune.grid.checkpoint import PackedCheckpoint
from pacatune.grid.formats import GRIDS
from pacatune.installation import require_extra


@dataclass(frozen=True, kw_only=True)
class GgufCheckpoint(PackedCheckpoint):
    """The tensors of a GGUF file."""

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
        _check_places(entries, path.stat().st_size, file)
        architecture = str(fields.get("general.architecture", ""))
        return cls(
            folder=file.parent, files=(file.name,), entries=entries, architecture=architecture
        )

    @property
    def title(self) -> str:
        """The file, for messages."""
        return str(self.folder / self.files[0])

    def tensor(self, name: str) -> Tensor:
        """Return a tensor of plain numbers."""
        entry = self.entries[name]
        return self._bytes(entry).view(DTYPES[entry.dtype]).view(entry.shape)

    def rows(self, name: str) -> Tensor:
        """Return (O, bytes) uint8, the rows of a quantised matrix, in the file's order."""
        entry = self.entries[name]
        return self._bytes(entry).view(entry.shape[0], -1)

    def scales(self, name: str, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Return scale and minimum of columns, which are in their blocks."""
        return GRIDS[self.entries[name].dtype].scales(self.rows(name), indices)

    def name_of(self, parameter: str, num_blocks: int) -> str:
        """Return the name that llama.cpp gives a parameter of transformers.

        Raises:
            ValueError: If there is none here, or the package gguf does not know the model.
        """
        import gguf

        kinds = {name: arch for arch, name in gguf.MODEL_ARCH_NAMES.items()}
        if self.architecture not in kinds:
            raise ValueError(
                f"{self.title} is of the architecture {self.architecture!r}, which the package "
                "gguf does not know; upgrade it."
            )
        names = gguf.get_tensor_name_map(kinds[self.architecture], num_blocks)
        name = names.get_name(parameter, try_suffixes=(".weight", ".bias"))
        if name not in self.entries:
            raise ValueError(
                f"{self.title} has no tensor of its own for {parameter!r}; leave it out of the "
                "targets."
            )
        return str(name)

    def _bytes(self, entry: Entry) -> Tensor:
        if entry.file not in self._opened:
            path = file_path(self.folder, entry.file)
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


def _check_places(entries: dict[str, Entry], size: int, file: Path) -> None:
    """Refuse tensors beyond the end of the file, and such as share bytes: one edit changes both."""
    ordered = sorted(entries.items(), key=lambda item: (item[1].start, item[1].num_bytes))
    for name, entry in ordered:
        if entry.start + entry.num_bytes > size:
            raise ValueError(f"{file} ends within {name!r}; it is damaged. Copy it again.")
    for (name, entry), (other, following) in pairwise(ordered):
        if following.start < entry.start + entry.num_bytes:
            raise ValueError(
                f"{name!r} and {other!r} share bytes of {file}, so a change of one would change "
                "both; it is damaged. Copy it again, or convert it anew."
            )


def _is_short(field: Any) -> bool:
    """Whether a field of the header is one value: lists have a token each."""
    return len(field.data) == 1 and len(field.types) == 1
