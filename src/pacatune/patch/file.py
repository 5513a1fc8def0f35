"""Read and write patch files: safetensors with the columns, and a checksum over everything.

A file holds, for each tensor NAME of the checkpoint,

    NAME.indices    (R,) int64
    NAME.before     the base's columns, in its dtype
    NAME.after      the patched ones

and `pacatune_adapter.*`, the files of the adapter it was made of, if that is kept. The JSON under
`pacatune_patch` in the file's metadata has the rest: shapes, dimensions, the base's fingerprint.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

from torch import Tensor

from pacatune.files.checkpoint import DTYPES
from pacatune.files.folder import explained_failure, sync, whole_file
from pacatune.files.json_file import check_strings, parse_json_object
from pacatune.files.tensor_file import read_layout, read_tensors, write_tensors
from pacatune.grid.columns import WeightColumns
from pacatune.ops.columns import bits
from pacatune.patch.edit import Patch

_KEY = "pacatune_patch"
_VERSION = 2
_ADAPTER = "pacatune_adapter."


def save(patch: Patch, path: str | Path) -> int:
    """Write a patch file, all at once, and return its size in bytes.

    Args:
        patch: What to write.
        path: A new file.

    Raises:
        FileExistsError: If there is something under that name.
        ValueError: If the disk is full; nothing is left then.
    """
    path = refuse_existing(path)
    tensors, metadata = _pack(patch)
    metadata["digest"] = _digest(tensors, metadata)
    path.absolute().parent.mkdir(parents=True, exist_ok=True)
    with explained_failure(path), whole_file(path) as partial:
        write_tensors(tensors, partial, metadata={_KEY: json.dumps(metadata, sort_keys=True)})
        sync(partial)
    return path.stat().st_size


def refuse_existing(path: str | Path) -> Path:
    """Refuse a name for a new file that is taken."""
    path = Path(path)
    if path.exists() or path.is_symlink():
        raise FileExistsError(f"output {str(path)!r} exists; choose another name or remove it.")
    return path


def load(path: str | Path) -> Patch:
    """Read and check a patch file; only safetensors and JSON are opened, nothing is run.

    Raises:
        FileNotFoundError: If there is none.
        ValueError: If it is no patch, damaged, or of another version.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"patch {str(path)!r} does not exist, or is no file.")
    text = read_layout(path).metadata.get(_KEY)
    if not isinstance(text, str):
        raise ValueError(f"{path} is no patch; `pacatune patch make` writes one.")
    metadata = parse_json_object(text.encode(), source=f"the metadata of {path}")
    if (version := metadata.get("version")) != _VERSION:
        raise ValueError(
            f"{path} is a patch of version {version!r}, and this pacatune reads {_VERSION}; use "
            "the pacatune that made it."
        )
    check_strings(metadata, f"the metadata of {path}")
    tensors = read_tensors(path)
    digest = metadata.pop("digest", None)
    if digest != _digest(tensors, metadata):
        raise ValueError(f"{path} is damaged: its checksum does not fit. Copy it again.")
    try:
        return _unpack(tensors, metadata)
    except (KeyError, TypeError, AttributeError, ValueError, OverflowError) as error:
        raise ValueError(
            f"{path} lacks a part of a patch, or has a wrong one ({type(error).__name__}: {error});"
            " make it again."
        ) from error


def is_patch(path: str | Path) -> bool:
    """Whether a path is a patch file, by its header; ValueError for a damaged safetensors file."""
    path = Path(path)
    return path.is_file() and _KEY in read_layout(path).metadata


def _pack(patch: Patch) -> tuple[dict[str, Tensor], dict[str, Any]]:
    tensors: dict[str, Tensor] = {}
    for name, columns in patch.before.items():
        tensors[f"{name}.indices"] = columns.indices.cpu()
        tensors[f"{name}.before"] = columns.values.cpu()
        tensors[f"{name}.after"] = patch.after[name].values.cpu()
    metadata: dict[str, Any] = {
        "version": _VERSION,
        "base": patch.base,
        "tensors": {
            name: {"dim": columns.dim, "shape": list(columns.shape), "grid": columns.grid}
            for name, columns in patch.before.items()
        },
        "fingerprint": patch.fingerprint,
    }
    tensors |= {f"{_ADAPTER}{name}": content for name, content in patch.adapter.items()}
    return tensors, metadata


def _unpack(tensors: dict[str, Tensor], metadata: dict[str, Any]) -> Patch:
    changes = []
    for name, entry in metadata["tensors"].items():
        before, grid = tensors[f"{name}.before"], str(entry["grid"])
        if not grid and before.dtype not in DTYPES.values():
            raise TypeError(f"{name!r} is {before.dtype}")
        columns = WeightColumns(
            name=name,
            dim=int(entry["dim"]),
            shape=tuple(int(size) for size in entry["shape"]),
            indices=tensors[f"{name}.indices"],
            values=before,
            grid=grid,
        )
        changes.append((columns, tensors[f"{name}.after"]))
    adapter = {
        name.removeprefix(_ADAPTER): content
        for name, content in tensors.items()
        if name.startswith(_ADAPTER)
    }
    base, fingerprint = str(metadata["base"]), metadata["fingerprint"]
    return Patch.of(changes, base=base, fingerprint=fingerprint, adapter=adapter)


def _digest(tensors: dict[str, Tensor], metadata: dict[str, Any]) -> str:
    """Return the SHA-256 of all tensors, with their names, and of the metadata."""
    digest = hashlib.sha256(json.dumps(metadata, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"\n{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(bits(tensor.contiguous()).numpy().data)
    return digest.hexdigest()
