"""Columns as versions of a checkpoint in a folder, as engines of other frameworks take them.

    DeltaFolder          weight_v000001, ...   read by slime, miles and modelexpress
    SkyrlDeltaFolder     delta-00000001, ...   read by SkyRL

Version 0 is the base's own files. Each later one has, for every tensor that it changes, all bytes
XOR those of the version before, as a zstd frame, and a digest of the new tensor, which the reader
checks. So a sync reads each tensor that it changes from the base's files, and compresses and hashes
all of it: O(OI), not O(OR). Only columns are kept in memory.
"""

import json
import zlib
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import torch
from safetensors import safe_open
from torch import Tensor

from pacatune.files.checkpoint import Checkpoint
from pacatune.files.folder import staged_folder
from pacatune.files.tensor_file import read_layout, write_tensors
from pacatune.grid.columns import WeightColumns, put_bits_
from pacatune.installation import require_extra
from pacatune.ops.columns import bits
from pacatune.patch.difference import changed_columns
from pacatune.patch.memory import check_form, refuse_missing
from pacatune.precision import dtype_name
from pacatune.sync.message import Columns

_FIX = (
    "Give the base that is trained, and make the source with its dtype: `ColumnSource(model, "
    "dtype)`. Experts that the base's files split cannot be targets."
)


class DeltaFolder:
    """A transport that writes each sync as the next version of a checkpoint.

    A version has its name when it is complete, and stays. A trainer that was restarted goes on
    after the last one: it reads all that are there, as a new engine does, and its first version
    leads from there to the new columns.

    Args:
        folder: Made if it is missing; it holds the versions of one run and nothing else.
        base: Model folder that trainer and engines have loaded.

    Raises:
        FileNotFoundError: If the base has no safetensors.
        ValueError: If the folder holds anything else, or a package is not installed.
    """

    _version = "weight_v{:06}"
    _shard = "model-00000-of-00001.safetensors"
    _index = "model.safetensors.index.json"
    _packages: tuple[str, ...] = ("zstandard",)

    def __init__(self, folder: str | Path, *, base: str | Path) -> None:
        require_extra(type(self).__name__, "delta", self._packages)
        self.folder, self._base = Path(folder), Checkpoint.open(base)
        self._changed: dict[str, WeightColumns] = {}  # of the base, by the last version
        versions = self._find_versions()
        self.version = len(versions)
        """Number of the last version, which engines are told to take."""
        shards = [shard for path in versions for shard in sorted(path.glob("*.safetensors"))]
        layouts = [(shard, read_layout(shard).tensors) for shard in shards]
        for name in dict.fromkeys(name for _, tensors in layouts for name in tensors):
            plain = self._tensor(name)
            last = self._read([shard for shard, tensors in layouts if name in tensors], name, plain)
            if (change := changed_columns(name, plain, last)) is not None:
                self._changed[name] = replace(change[0], values=change[1])

    def send(self, columns: Columns, timeout: float | None = None) -> None:
        """Write a sync as the next version.

        Raises:
            ValueError: If the base lacks a tensor or has it in another dtype, or the disk is full;
                nothing was written then.
            FileExistsError: If another trainer has written this version.
        """
        values = columns.positions.by_name(columns.buffer.cpu())
        new: dict[str, WeightColumns] = {
            item.name: replace(item, values=values[item.name]) for item in columns.positions.sets
        }
        changes = [self._change(name, new.get(name)) for name in self._changed | new]
        self._write([change for change in changes if change is not None])
        self.version += 1
        self._changed = new

    def receive(self, timeout: float | None = None) -> NoReturn:
        """Refuse: engines read the folder."""
        raise ValueError("this end writes; engines read the folder by code of their own.")

    def close(self) -> None:
        """Leave the versions as they are: none of them is marked as the last one."""

    def _find_versions(self) -> list[Path]:
        """Return the versions that are there; refuse gaps and whatever else is there."""
        paths = self.folder.iterdir() if self.folder.exists() else ()
        present = {path for path in paths if not path.name.startswith(".")}  # those are unfinished
        numbers = range(1, 1 + len(present))
        versions = [self.folder / self._version.format(number) for number in numbers]
        if wrong := present - {path for path in versions if (path / self._index).is_file()}:
            raise ValueError(
                f"{min(wrong)} is none of the complete versions {self._version.format(1)!r}, ... "
                "that may be there, without a gap; choose a folder for the versions of one run."
            )
        return versions

    def _tensor(self, name: str) -> Tensor:
        """Return a tensor of the base."""
        if name not in self._base.entries:
            refuse_missing([name], self._base.entries, _FIX)
        return self._base.tensor(name)

    def _change(
        self, name: str, columns: WeightColumns | None
    ) -> tuple[dict[str, Any], Tensor] | None:
        """Return what the next version says of a tensor, None if it stays as it is.

        Returns:
            Words about it, and (F,) uint8, the compressed XOR.
        """
        import zstandard

        old, new = self._tensor(name), self._tensor(name).clone()
        if columns is not None:
            check_form(name, (tuple(new.shape), new.dtype), (columns.shape, columns.dtype), _FIX)
            put_bits_(new, columns.dim, columns.indices, columns.values)
        if (last := self._changed.get(name)) is not None:
            put_bits_(old := old.clone(), last.dim, last.indices, last.values)
        difference = bits(old) ^ bits(new)
        if not difference.any():
            return None
        frame = zstandard.ZstdCompressor(level=1).compress(_bytes_of(difference).numpy().data)
        words = {
            "name": name,
            "dtype": dtype_name(new.dtype),
            "shape": list(new.shape),
            "uncompressed_num_bytes": new.nbytes,
            "compressed_num_bytes": len(frame),
            "checksum": self._digest(_bytes_of(new).numpy()),
        }
        return words, torch.frombuffer(bytearray(frame), dtype=torch.uint8)

    def _read(self, shards: list[Path], name: str, plain: Tensor) -> Tensor:
        """Return the tensor that an earlier trainer's versions make of the base's."""
        import zstandard

        tensor, digest = plain.clone(), None
        data = _bytes_of(tensor)
        for shard in shards:
            with safe_open(shard, framework="pt") as file:
                frame, digest = file.get_tensor(name), (file.metadata() or {}).get(name)
            with suppress(zstandard.ZstdError, RuntimeError, ValueError):  # the digest tells
                reader = zstandard.ZstdDecompressor().stream_reader(frame.numpy())
                data ^= torch.frombuffer(bytearray(reader.read(len(data))), dtype=torch.uint8)
        if self._digest(data.numpy()) != digest:
            raise ValueError(
                f"the versions in {str(self.folder)!r} do not lead on from {self._base.folder} in "
                f"{name!r}: they have another base, or are damaged. Give their base, or a new "
                "folder."
            )
        return tensor

    def _write(self, changes: list[tuple[dict[str, Any], Tensor]]) -> None:
        path = self.folder / self._version.format(self.version + 1)
        frames = {words["name"]: frame for words, frame in changes}
        digests = {words["name"]: words["checksum"] for words, _ in changes}
        try:
            with staged_folder(path, sum(frame.nbytes for frame in frames.values())) as staging:
                if frames:
                    write_tensors(frames, staging / self._shard, metadata=digests)
                index = self._describe(self.version + 1, [words for words, _ in changes])
                (staging / self._index).write_text(json.dumps(index), encoding="utf-8")
        except FileExistsError:
            raise FileExistsError(
                f"another trainer writes to {str(self.folder)!r}; give each a folder of its own."
            ) from None

    def _digest(self, data: Any) -> str:
        return f"{zlib.adler32(data):08x}"

    def _describe(self, version: int, tensors: list[dict[str, Any]]) -> dict[str, Any]:
        """Return what the index says, given words about each changed tensor."""
        metadata = {
            "version": f"{version:06}",
            "base_version": f"{version - 1:06}",
            "delta_encoding": "xor",
            "compression_format": "zstd",
            "checksum_format": "adler32",
        }
        return {
            "metadata": metadata,
            "weight_map": {entry["name"]: self._shard for entry in tensors},
        }


class SkyrlDeltaFolder(DeltaFolder):
    """The same in SkyRL's layout."""

    _version = "delta-{:08}"
    _shard = "delta-rank00000-file000000.safetensors"
    _index = "manifest.json"
    _packages = ("zstandard", "xxhash")

    def _digest(self, data: Any) -> str:
        import xxhash

        return str(xxhash.xxh3_128(data).hexdigest())

    def _describe(self, version: int, tensors: list[dict[str, Any]]) -> dict[str, Any]:
        same = {"payload_file": self._shard, "checksum_algorithm": "xxh3-128"}
        return {
            "version": version,
            "base_version": version - 1,
            "tensors": [{**entry, **same, "payload_key": entry["name"]} for entry in tensors],
            "total_uncompressed_num_bytes": sum(
                entry["uncompressed_num_bytes"] for entry in tensors
            ),
            "total_compressed_num_bytes": sum(entry["compressed_num_bytes"] for entry in tensors),
            "payload_files": [self._shard] if tensors else [],
        }


def _bytes_of(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1).view(torch.uint8)
