"""Reads columns of the weights that a quantised model was made from, out of its checkpoint."""

import json
from pathlib import Path

from safetensors import safe_open
from torch import Tensor, nn

__all__ = ["OriginalWeights"]

_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_FIX = "use `columns_from='dequantized'`, which needs no checkpoint."
# Rounding to 4 bits moves a weight by a tenth of their size; other weights, by more than it.
_MOST_DIFFERENCE = 0.5


class OriginalWeights:
    """The safetensors checkpoint that a quantised transformers model was loaded from.

    Args:
        model: Knows the folder or hub id it came from (`name_or_path`).

    Raises:
        ValueError: If there is no such checkpoint.
    """

    def __init__(self, model: nn.Module) -> None:
        self.name = getattr(model, "name_or_path", None) or ""
        self.prefix = getattr(model, "base_model_prefix", "")
        self.files = self._find_files() if self.name else {}
        if not self.files:
            raise ValueError(
                f"`columns_from` ('original'): no safetensors checkpoint at {self.name!r}, where "
                f"this model was loaded from; {_FIX}"
            )

    def columns(self, module_name: str, indices: Tensor, *, like: Tensor) -> Tensor:
        """Read columns of one weight.

        Args:
            module_name: The module in the model.
            indices: (R,) columns.
            like: (O, I) the same weight, dequantised.

        Returns:
            (O, R) in float32, on the device of `like`.

        Raises:
            ValueError: If the checkpoint holds no such weight, or another one.
        """
        key = self._find_key(f"{module_name}.weight")
        with safe_open(self.files[key], framework="pt") as file:
            weight = file.get_tensor(key)
        if not weight.is_floating_point() or weight.shape != like.shape:
            raise ValueError(
                f"`columns_from` ('original'): {key!r} in {self.name} is {tuple(weight.shape)} of "
                f"{weight.dtype}, not the {tuple(like.shape)} weight before quantisation; {_FIX}"
            )
        columns: Tensor = weight[:, indices.cpu()].float().to(like.device)
        rounded = like.index_select(1, indices)
        difference = (columns - rounded).norm() / columns.norm().clamp_min(1e-30)
        if not difference < _MOST_DIFFERENCE:
            raise ValueError(
                f"`columns_from` ('original'): {key!r} in {self.name} differs from the quantised "
                f"weight by {difference:.0%} of its size; it is not what this model was quantised "
                f"from. Load the base from its own checkpoint, or {_FIX}"
            )
        return columns

    def _find_key(self, name: str) -> str:
        prefix = f"{self.prefix}."
        for key in (name, prefix + name, name.removeprefix(prefix)):
            if key in self.files:
                return key
        raise ValueError(
            f"`columns_from` ('original'): {self.name} holds no {name!r} (transformers may have "
            f"fused or renamed it on loading); {_FIX}"
        )

    def _find_files(self) -> dict[str, str]:
        """Map each tensor of the checkpoint to its file."""
        single = self._cached(_SINGLE)
        if single is not None:
            with safe_open(single, framework="pt") as file:
                return dict.fromkeys(file.keys(), single)
        index = self._cached(_INDEX)
        if index is None:
            return {}
        names: dict[str, str] = json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"]
        paths = {name: self._cached(Path(name).name) for name in set(names.values())}
        return {key: path for key, name in names.items() if (path := paths[name]) is not None}

    def _cached(self, file: str) -> str | None:
        from transformers.utils import cached_file

        try:
            path: str | None = cached_file(
                self.name,
                file,
                _raise_exceptions_for_gated_repo=False,
                _raise_exceptions_for_missing_entries=False,
                _raise_exceptions_for_connection_errors=False,
            )
        except OSError:  # not a name that a hub could have
            return None
        return path
