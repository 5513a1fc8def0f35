"""Tell one base model from another of the same shapes, by a few hundred of its weights.

The fingerprint of each adapted module hashes up to 64 x 16 weights from rows and columns at equal
distances: once of the columns that no row trains, and once of the trained ones, as they were before
training, which tell a base into which the adapter is merged already. Loading a base in fewer bits
rounds its weights, so one hash is kept for each dtype that the weights can be rounded to; two loads
of one base always share one, except bfloat16 against float16.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pacatune.adapters.base import innermost
from pacatune.adapters.folder import (
    FINGERPRINT_KEY,
    SIDECAR_NAME,
    Adapter,
    read_adapter,
    read_sidecar,
)
from pacatune.adapters.target import BaseWeight, target_of_module
from pacatune.files.owned_folder import write_whole
from pacatune.grid.columns import columns_beside, spread
from pacatune.ops.whole import is_whole
from pacatune.precision import torch_dtype

SHAPE_KEYS = ("hidden_size", "num_hidden_layers", "vocab_size")

_MAX_ROWS, _MAX_COLUMNS = 64, 16
_HASH_DIGITS = 16
# dtype of the weights -> the dtypes they can be rounded to, as a load in that dtype would.
_ROUNDINGS = {
    torch.float64: ("float32", "bfloat16", "float16"),
    torch.float32: ("float32", "bfloat16", "float16"),
    torch.bfloat16: ("bfloat16",),
    torch.float16: ("float16",),
}


def fingerprint(model: nn.Module, adapter_modules: Mapping[str, Tensor]) -> dict[str, Any]:
    """Compute the fingerprint of a base model, for some modules with their adapted columns.

    JSON-ready: `architecture`, `model_type`, a few sizes, and `modules` and `trained`, which map a
    module's name to the hashes by dtype of its other and of its adapted columns. A module has no
    hashes if its weight is quantised, sharded, not loaded, or has no such columns; of those into
    which an adapter is merged, the adapted ones have none.
    """
    model = unwrap(model)
    config = getattr(model, "config", None)
    # fully_shard puts FSDP before the name of the class.
    result: dict[str, Any] = {"architecture": type(model).__name__.removeprefix("FSDP")}
    for key in ("model_type", *SHAPE_KEYS):
        if (value := getattr(config, key, None)) is not None:
            result[key] = value
    merged = {id(innermost(m)) for m in model.modules() if getattr(m, "merged_adapters", None)}
    result |= {"modules": {}, "trained": {}}
    for name, indices in adapter_modules.items():
        target = target_of_module(model, name)
        beside = columns_beside(indices, target.layout.in_features, _MAX_COLUMNS)
        result["modules"][name] = _hash_target(target, beside)
        if id(target.module) not in merged:
            result["trained"][name] = _hash_target(target, spread(indices.cpu(), _MAX_COLUMNS))
    return result


def write_fingerprint(folder: str | Path, model: nn.Module, adapter: Adapter | None = None) -> None:
    """Store the fingerprint of a base, or of the one in a PEFT model, in an adapter's folder.

    The adapter is the one in the folder, if none is given.
    """
    path = Path(folder) / SIDECAR_NAME
    adapter = adapter or read_adapter(folder)
    columns = {name: update.indices for name, update in adapter.modules.items()}
    sidecar = {**adapter.sidecar, **read_sidecar(path.parent)}
    sidecar[FINGERPRINT_KEY] = fingerprint(model, columns)
    write_whole(path, json.dumps(sidecar, indent=2, sort_keys=True) + "\n")


def differing_modules(
    stored: Mapping[str, Mapping[str, str]], current: Mapping[str, Mapping[str, str]]
) -> tuple[list[str], int]:
    """Return which modules of two fingerprints differ, and how many could be compared."""
    differing, num_compared = [], 0
    for name, hashes in current.items():
        shared = hashes.keys() & stored.get(name, {}).keys()
        num_compared += bool(shared)
        # Both sides round downwards from what they have, so any shared dtype must agree.
        if any(hashes[dtype] != stored[name][dtype] for dtype in shared):
            differing.append(name)
    return differing, num_compared


def unwrap(model: nn.Module) -> nn.Module:
    """Return the base model inside a PEFT model, else the model itself."""
    get_base_model = getattr(model, "get_base_model", None)
    return model if get_base_model is None else get_base_model()


@torch.no_grad()
def _hash_target(target: BaseWeight, columns: Tensor) -> dict[str, str]:
    weight = getattr(target.module, target.parameter_name, None)
    if not isinstance(weight, Tensor) or not _is_readable(weight) or len(columns) == 0:
        return {}
    weight = target.layout.first_matrix(weight)
    rows = spread(torch.arange(weight.shape[0], device=weight.device), _MAX_ROWS)
    sample = weight.detach()[rows.to(weight.device)][:, columns.to(weight.device)].cpu()
    return {name: _hash(sample, torch_dtype(name)) for name in _ROUNDINGS[weight.dtype]}


def _is_readable(weight: Tensor) -> bool:
    is_here = weight.ndim > 1 and weight.numel() > 0 and is_whole(weight, weight.ndim)
    return weight.dtype in _ROUNDINGS and is_here


def _hash(sample: Tensor, dtype: torch.dtype) -> str:
    # NumPy has no bfloat16; float32 holds each value of the three dtypes.
    rounded = sample.to(dtype).float().contiguous()
    return hashlib.sha256(rounded.numpy().tobytes()).hexdigest()[:_HASH_DIGITS]
