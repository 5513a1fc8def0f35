"""What was collected about the columns of a model: numbers that can be saved and looked at."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from pacatune.files.folder import explained_failure
from pacatune.files.plain import find_file
from pacatune.files.tensor_file import read_tensors, write_tensors
from pacatune.format.options import Columns
from pacatune.format.tensors import INDICES, PEFT_PREFIX, TENSORS_NAME

__all__ = ["ColumnStatistics", "load_columns", "save_columns"]

_COUNT = "num_batches"


@dataclass(frozen=True, kw_only=True)
class ColumnStatistics:
    """Sums of squares by column, over batches.

    With dW_t the gradient of the loss of batch t,

        gradient[i]      sum over t of ||dW_t[:, i]||^2

    Raises:
        ValueError: If there are no batches, or a value is no finite sum of squares.
    """

    values: Mapping[str, Mapping[str, Tensor]]
    """Module's name in the base model -> kind -> (I,) float64 on the CPU."""
    num_batches: int
    """Batches of all processes."""

    def __post_init__(self) -> None:
        """Check every value."""
        if self.num_batches < 1:
            raise ValueError(f"`num_batches` ({self.num_batches}) must be at least 1.")
        for module, kinds in self.values.items():
            for kind, values in kinds.items():
                is_sum = kind == "gradient" and values.dim() == 1 and values.is_floating_point()
                if not (is_sum and values.isfinite().all() and (values >= 0).all()):
                    raise ValueError(
                        f"the statistics of {module!r} have {kind!r}, {tuple(values.shape)} of "
                        f"{values.dtype}; it must be 'gradient', a finite sum of squares for each "
                        "column: the loss of a batch is not finite (no label in it?), or the file "
                        "is damaged."
                    )

    def of(self, module: str) -> Mapping[str, Tensor]:
        """Return what is known about a module's columns: kind -> (I,).

        Raises:
            ValueError: If nothing is.
        """
        if module not in self.values:
            raise ValueError(
                f"nothing was collected about {module!r}; collect it with the same "
                "`target_modules`."
            )
        return self.values[module]

    def save(self, path: str | Path) -> None:
        """Write a safetensors file with a tensor `<module>.<kind>` for each entry."""
        tensors = {
            f"{module}.{kind}": values
            for module, kinds in self.values.items()
            for kind, values in kinds.items()
        }
        tensors[_COUNT] = torch.tensor(self.num_batches, device="cpu")
        with explained_failure(Path(path)):
            write_tensors(tensors, Path(path))

    @classmethod
    def load(cls, path: str | Path) -> "ColumnStatistics":
        """Read what `save` wrote; nothing is run.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If it is damaged or of another kind.
        """
        tensors = read_tensors(_existing(Path(path)))
        if _COUNT not in tensors:
            raise ValueError(f"{path} was not written by ColumnStatistics.save; give such a file.")
        count = int(tensors.pop(_COUNT))
        values: dict[str, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            module, _, kind = name.rpartition(".")
            values.setdefault(module, {})[kind] = tensor
        return cls(values=values, num_batches=count)


# Columns from files: those of a PaCA adapter, or a list that somebody has written.


def load_columns(path: str | Path) -> Columns:
    """Read which columns an adapter trains, for `PacaConfig(selection=...)`.

    Args:
        path: A PaCA adapter's folder, its safetensors file, or one of `save_columns`.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is damaged, or holds no columns.
    """
    path = Path(path).expanduser()
    path = _existing(find_file(path, TENSORS_NAME) if path.is_dir() else path)
    tensors, columns = read_tensors(path), {}
    for name, indices in tensors.items():
        module, _, kind = name.rpartition(".")
        if kind == INDICES:
            columns[module.removeprefix(PEFT_PREFIX)] = indices.tolist()
    if not columns:
        raise ValueError(
            f"{path} holds no `{INDICES}`; give a PaCA adapter, or a file of save_columns."
        )
    return columns


def save_columns(columns: Columns, path: str | Path) -> None:
    """Write columns by module's name, in the format of an adapter's file without its deltas."""
    pairs = ((module, torch.tensor(values, device="cpu")) for module, values in columns.items())
    tensors = {f"{module}.{INDICES}": indices for module, indices in pairs}
    with explained_failure(Path(path)):
        write_tensors(tensors, Path(path))


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; check the path.")
    return path
