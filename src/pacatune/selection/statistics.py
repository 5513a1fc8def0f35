"""What was collected about the columns of a model: numbers that can be saved and looked at."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from pacatune.files.folder import explained_failure
from pacatune.files.plain import find_file
from pacatune.files.tensor_file import read_tensors, write_tensors
from pacatune.format.options import Columns
from pacatune.format.tensors import INDICES, PEFT_PREFIX, TENSORS_NAME
from pacatune.strategies import KINDS, SKETCH_ROWS

__all__ = [
    "ColumnStatistics",
    "load_columns",
    "save_columns",
]


_COUNT = "num_batches"


@dataclass(frozen=True, kw_only=True)
class ColumnStatistics:
    """Sums of squares by column, over batches.

    With x the tokens that a layer saw, and dW_t the gradient of the loss of batch t,

        gradient[i]      sum over t of ||dW_t[:, i]||^2
        activation[i]    sum over tokens of x[i]^2
        activation_sketch[k, i]    sum over the tokens of row k of +-x[i]; each token has a random
                                   row and sign

    Raises:
        ValueError: If a value is not finite, a sum of squares negative, or of another shape or an
            unknown kind.
    """

    values: Mapping[str, Mapping[str, Tensor]]
    """Module's name in the base model -> kind -> (I,) or (256, I) float64 on the CPU."""
    num_batches: int
    """Batches of all processes."""
    source: str = field(default="statistics", repr=False)
    """Where they come from, for messages."""

    def __post_init__(self) -> None:
        """Check every value."""
        if self.num_batches < 1:
            raise ValueError(
                f"{self.source}: `num_batches` ({self.num_batches}) must be at least 1; give some "
                "batches."
            )
        for module, kinds in self.values.items():
            for kind, values in kinds.items():
                _check(values, kind, f"{self.source}: module {module!r}")

    def of(self, module: str) -> Mapping[str, Tensor]:
        """Return what is known about a module's columns: kind -> (I,).

        Raises:
            ValueError: If nothing is.
        """
        if module not in self.values:
            raise ValueError(
                f"{self.source}: nothing was collected about {module!r}; collect it with the same "
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
        with explained_failure(Path(path)):
            write_tensors({**tensors, _COUNT: torch.tensor(self.num_batches)}, Path(path))

    @classmethod
    def load(cls, path: str | Path) -> "ColumnStatistics":
        """Read what `save` wrote; nothing is run.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If it is damaged or of another kind.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"statistics file {path} does not exist; check the path.")
        tensors = read_tensors(path)
        count = tensors.pop(_COUNT, None)
        if count is None or count.numel() != 1 or count.is_floating_point():
            raise ValueError(
                f"{path} does not say how many batches it is about; it was not written by "
                "ColumnStatistics.save."
            )
        values: dict[str, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            module, _, kind = name.rpartition(".")
            values.setdefault(module, {})[kind] = tensor
        return cls(values=values, num_batches=int(count), source=str(path))


def _check(values: Tensor, kind: str, where: str) -> None:
    if kind not in KINDS:
        raise ValueError(f"{where} has {kind!r}; the kinds of statistics are {KINDS}.")
    is_sketch = kind == "activation_sketch"
    fits = values.shape[:1] == (SKETCH_ROWS,) and values.dim() == 2 if is_sketch else True
    if values.dim() != 1 + is_sketch or not fits or not values.is_floating_point():
        rows = f"{SKETCH_ROWS} floating-point numbers" if is_sketch else "one floating-point number"
        raise ValueError(
            f"{where}: `{kind}` is {tuple(values.shape)} of {values.dtype}; it must be {rows} for "
            "each column."
        )
    is_negative = not is_sketch and bool((values < 0).any())
    if not bool(torch.isfinite(values).all()) or is_negative:
        raise ValueError(
            f"{where}: `{kind}` holds values that are not finite or below 0, but it is a sum of "
            "squares: the loss of a batch is not finite (no label in it?), or the file is damaged."
        )


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
    path = find_file(path, TENSORS_NAME) if path.is_dir() else path
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
        if tensor.dim() not in (1, 2) or tensor.dtype != torch.int64:
            raise ValueError(
                f"{path}: the columns of {module!r} are {tuple(tensor.shape)} of {tensor.dtype}; "
                "they must be a list of torch.int64, or one for each of `groups`."
            )
    return {module: tensor.tolist() for module, tensor in columns.items()}


def save_columns(columns: Columns, path: str | Path) -> None:
    """Write columns by module's name, in the format of an adapter's file without its deltas."""
    tensors = {f"{module}.{INDICES}": torch.tensor(values) for module, values in columns.items()}
    with explained_failure(Path(path)):
        write_tensors(tensors, Path(path))
