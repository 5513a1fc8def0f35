"""Read safetensors that a stranger wrote; nothing is allocated before the header is checked."""

import re
import struct
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from pacatune.files.json_file import parse_json_object

MAX_FILE_BYTES = 16 * 2**30
MAX_HEADER_BYTES = 16 * 2**20
MAX_NAME_LENGTH = 512

_NAME = re.compile(r"[A-Za-z0-9_\-]+(\.[A-Za-z0-9_\-]+)*")
_LENGTH_BYTES = 8


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read all tensors of a file onto the CPU; refuse a damaged or too large one, and odd names."""
    check_names(read_header(path), source=str(path))
    try:
        tensors: dict[str, Tensor] = load_file(path)
    except (SafetensorError, KeyError, RuntimeError, TypeError, AttributeError) as error:
        # KeyError and AttributeError: a dtype that safetensors or this torch does not know.
        raise ValueError(
            f"{path} is not a valid safetensors file ({error}); it is damaged. Copy it again."
        ) from error
    return tensors


class FileLayout(NamedTuple):
    """What the header of a safetensors file says."""

    tensors: dict[str, Any]
    """Name -> `dtype`, `shape` and `data_offsets`, the latter from `data_start` on."""
    metadata: dict[str, Any]
    """Words about the whole file."""
    data_start: int
    """Where the tensors begin, in bytes from the start of the file."""


def read_header(path: Path) -> dict[str, Any]:
    """Read the description of each tensor, without `__metadata__` and without the data."""
    return read_layout(path).tensors


def read_layout(path: Path, max_bytes: int | None = MAX_FILE_BYTES) -> FileLayout:
    """Read the whole header, without the data; a file of more than `max_bytes` is refused."""
    size = path.stat().st_size
    if max_bytes is not None and size > max_bytes:
        raise ValueError(f"{path} is {size} bytes; at most {max_bytes} are read.")
    with path.open("rb") as file:
        start = file.read(_LENGTH_BYTES)
        header_bytes = struct.unpack("<Q", start)[0] if len(start) == _LENGTH_BYTES else size
        if header_bytes > MAX_HEADER_BYTES and header_bytes < size:
            raise ValueError(
                f"{path} has a header of {header_bytes} bytes; at most {MAX_HEADER_BYTES} are read."
            )
        if _LENGTH_BYTES + header_bytes > size:
            raise ValueError(
                f"{path} is {size} bytes but its header alone needs "
                f"{_LENGTH_BYTES + header_bytes}; it is truncated or no safetensors file. "
                "Copy it again."
            )
        header = parse_json_object(file.read(header_bytes), source=f"the header of {path}")
    metadata = header.pop("__metadata__", None)
    data_start = _LENGTH_BYTES + header_bytes
    _check_extent(header, size - data_start, path)
    return FileLayout(header, metadata if isinstance(metadata, dict) else {}, data_start)


def check_names(names: dict[str, Any], *, source: str) -> None:
    """Refuse tensor names that are paths, or that a terminal would not print as they are."""
    for name in names:
        if len(name) > MAX_NAME_LENGTH or not _NAME.fullmatch(name):
            raise ValueError(
                f"{source} holds a tensor named {name[:80]!a}; a name must be words of letters, "
                f"digits, `_` and `-` joined by dots, at most {MAX_NAME_LENGTH} characters."
            )


def write_tensors(
    tensors: dict[str, Tensor], path: Path, *, metadata: dict[str, str] | None = None
) -> None:
    """Write tensors as PEFT does, marked as PyTorch's, with more `metadata` if need be."""
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    save_file(contiguous, path, metadata={"format": "pt", **(metadata or {})})


def _check_extent(header: dict[str, Any], num_bytes: int, path: Path) -> None:
    ends = [0]
    for name, entry in header.items():
        offsets = entry.get("data_offsets") if isinstance(entry, dict) else None
        if (
            not isinstance(offsets, list)
            or len(offsets) != 2
            or not all(type(offset) is int and offset >= 0 for offset in offsets)
        ):
            raise ValueError(
                f"{path} does not say where tensor {name[:80]!a} lies; the header is damaged. "
                "Copy it again."
            )
        ends.append(offsets[1])
    if max(ends) != num_bytes:
        problem = "truncated" if max(ends) > num_bytes else "followed by other data"
        raise ValueError(
            f"{path} holds {num_bytes} bytes of tensors but its header describes {max(ends)}; "
            f"it is {problem}. Copy it again."
        )
