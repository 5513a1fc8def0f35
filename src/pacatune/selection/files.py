"""Columns from files: those of a PaCA adapter, or a list that somebody has written."""

from pathlib import Path

import torch

from pacatune.adapters.folder import TENSORS_NAME
from pacatune.adapters.tensor_file import read_tensors, write_tensors
from pacatune.checks import INDICES, PEFT_PREFIX

__all__ = ["load_columns", "save_columns"]


def load_columns(path: str | Path) -> dict[str, list[int]]:
    """Read which columns an adapter trains, for `PacaConfig(selection=...)`.

    Args:
        path: A PaCA adapter's folder, its safetensors file, or one of `save_columns`.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is damaged, or holds no columns.
    """
    path = Path(path).expanduser()
    path = path / TENSORS_NAME if path.is_dir() else path
    if not path.is_file():
        raise FileNotFoundError(f"columns file {path} does not exist; check the path.")
    suffix = f".{INDICES}"
    columns = {
        name.removesuffix(suffix).removeprefix(PEFT_PREFIX): tensor
        for name, tensor in read_tensors(path).items()
        if name.endswith(suffix)
    }
    if not columns:
        raise ValueError(
            f"{path} holds no `{INDICES}`; give a PaCA adapter, or a file of save_columns."
        )
    for module, tensor in columns.items():
        if tensor.dim() != 1 or tensor.dtype != torch.int64:
            raise ValueError(
                f"{path}: the columns of {module!r} are {tuple(tensor.shape)} of {tensor.dtype}; "
                "they must be a list of torch.int64."
            )
    return {module: tensor.tolist() for module, tensor in columns.items()}


def save_columns(columns: dict[str, list[int]], path: str | Path) -> None:
    """Write columns by module's name, in the format of an adapter's file without its deltas."""
    tensors = {f"{module}.{INDICES}": torch.tensor(values) for module, values in columns.items()}
    write_tensors(tensors, Path(path))
