"""Read safetensors that a stranger wrote; nothing is allocated before the header is checked."""

import re
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
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
    for name in read_layout(path).tensors:
        # No paths, and nothing that a terminal would not print as it is.
        if len(name) > MAX_NAME_LENGTH or not _NAME.fullmatch(name):
            raise ValueError(
                f"{path} holds a tensor named {name[:80]!a}; a name must be words of letters, "
                f"digits, `_` and `-` joined by dots, at most {MAX_NAME_LENGTH} characters."
            )
    try:
        with torch.device("cpu"):  # old safetensors takes the default device
            tensors: dict[str, Tensor] = load_file(path)
    except (KeyError, AttributeError) as error:  # a dtype that this torch does not know
        raise ValueError(f"{path} holds tensors of the type {error}, which torch lacks.") from error
    return tensors


class FileLayout(NamedTuple):
    """What the header of a safetensors file says."""

    tensors: dict[str, Any]
    """Name -> `dtype`, `shape` and `data_offsets`, the latter from `data_start` on."""
    metadata: dict[str, Any]
    """Words about the whole file."""
    data_start: int
    """Where the tensors begin, in bytes from the start of the file."""


def read_layout(path: Path, max_bytes: int | None = MAX_FILE_BYTES) -> FileLayout:
    """Read the whole header, without the data; a file of more than `max_bytes` is refused."""
    size = path.stat().st_size
    if max_bytes is not None and size > max_bytes:
        raise ValueError(f"{path} is {size} bytes; at most {max_bytes} are read.")
    with path.open("rb") as file:
        header_bytes = int.from_bytes(file.read(_LENGTH_BYTES), "little")
        if header_bytes > MAX_HEADER_BYTES:
            raise ValueError(
                f"{path} has a header of {header_bytes} bytes; at most {MAX_HEADER_BYTES} are "
                "read. It is truncated or no safetensors file."
            )
        try:
            # Checks that dtypes, shapes and offsets fit each other, without gaps and overlaps.
            with safe_open(path, framework="pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise ValueError(
                f"{path} is truncated or no safetensors file ({error}); it is damaged. "
                "Copy it again."
            ) from error
        header = parse_json_object(file.read(header_bytes), source=f"the header of {path}")
    metadata = header.pop("__metadata__", None)
    return FileLayout(header, metadata or {}, _LENGTH_BYTES + header_bytes)


def write_tensors(
    tensors: dict[str, Tensor], path: Path, *, metadata: dict[str, str] | None = None
) -> None:
    """Write tensors as PEFT does, marked as PyTorch's, with more `metadata` if need be."""
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    save_file(contiguous, path, metadata={"format": "pt", **(metadata or {})})
    path.chmod(path.absolute().parent.stat().st_mode & 0o666)  # safetensors makes its own private
