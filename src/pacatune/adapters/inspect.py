"""Describe an adapter folder without its base model."""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pacatune.adapters.folder import (
    CONFIG_NAME,
    Adapter,
    find_tensors,
    locate_folder,
    read_adapter,
)
from pacatune.files.json_file import read_json_object
from pacatune.files.plain import find_file
from pacatune.files.tensor_file import read_tensors
from pacatune.format.options import FILE_TYPES, format_quantization
from pacatune.format.tensors import check_finite


@dataclass(frozen=True, kw_only=True)
class ModuleReport:
    """One adapted module."""

    name: str
    """In the base model, such as `model.layers.0.self_attn.q_proj`."""
    rank: int
    """Rank of the update; the number of columns, unless `channels` says another."""
    scaling: float
    """Factor of the update, alpha / rank."""
    out_features: int
    """Outputs of the module; of one group, for a convolution with groups."""
    num_parameters: int
    """Trained numbers."""
    update_norm: float
    """Frobenius norm of W' - W."""
    columns: list[int]
    """The trained columns."""


@dataclass(frozen=True, kw_only=True)
class AdapterReport:
    """What an adapter folder holds."""

    folder: Path
    """Where it lies."""
    method: str
    """`PACA`, `LORA`, ..."""
    base: str | None
    """Name of the base it was trained on."""
    task_type: str | None
    """Such as `CAUSAL_LM`."""
    rank: int | None
    """For modules without a pattern of their own."""
    alpha: float | None
    """For modules without a pattern of their own."""
    scaling: float | None
    """alpha / rank."""
    channels: float | None
    """Trained columns, or their share, whose update has that rank; None: `rank` columns."""
    random_seed: int | None
    """PaCA: chose the columns; None where they were not chosen by a seed."""
    selection: str | None
    """PaCA: the strategy that chose the columns; "fixed" where they were given."""
    selection_options: dict[str, Any] | None
    """PaCA: what they were chosen from, such as the number of batches."""
    targets: list[str]
    """`target_modules` of the configuration."""
    modules: list[ModuleReport]
    """PaCA: adapted modules, largest update first."""
    num_modules_by_kind: dict[str, int]
    """Number of adapted modules by the last part of their name."""
    extra: list[str]
    """Other tensors: biases, `modules_to_save`, token embeddings; all those of other methods."""
    num_trainable_parameters: int
    """Trained numbers, extra tensors included."""
    file_bytes: int
    """Size of the tensor file."""
    base_quantization: str | None
    """PaCA: how the base that it was trained on is quantised."""


def inspect_adapter(folder: str | Path) -> AdapterReport:
    """Read and describe an adapter; PaCA adapters are checked in full, others only read safely.

    Args:
        folder: A local folder or a hub id.

    Raises:
        FileNotFoundError: If it is missing or incomplete.
        ValueError: If it is damaged; see `read_adapter`.
    """
    folder = locate_folder(folder)
    config = read_json_object(find_file(folder, CONFIG_NAME))
    method, alpha = config.get("peft_type"), _typed(config, "lora_alpha", int, float)
    modules: list[ModuleReport] = []
    if method in FILE_TYPES:
        adapter = read_adapter(folder)
        config, alpha = {**vars(adapter.config), "peft_type": "PACA"}, adapter.config.paca_alpha
        modules, extra, copies = _paca_modules(adapter), adapter.extra, adapter.copies()
    elif isinstance(method, str):
        extra = read_tensors(find_tensors(folder))
        check_finite(extra, source=str(folder))
        # PEFT copies the frozen weight of an adapted embedding or head into the file.
        copies = [name for name in extra if name.endswith(".base_layer.weight")]
    else:
        raise ValueError(
            f"{folder / CONFIG_NAME} gives `peft_type` = {method!r}; it must name a PEFT method."
        )
    quantization = _typed(config, "base_quantization", dict)
    targets = _typed(config, "target_modules", str, list, set) or []
    rank = _typed(config, "r", int)
    num_extra = sum(tensor.numel() for name, tensor in extra.items() if name not in copies)
    return AdapterReport(
        folder=folder,
        method=str(config["peft_type"]),
        base=_typed(config, "base_model_name_or_path", str),
        task_type=_typed(config, "task_type", str),
        rank=rank,
        alpha=alpha,
        scaling=alpha / rank if rank and alpha is not None else None,
        channels=_typed(config, "channels", int, float),
        random_seed=_typed(config, "random_seed", int),
        selection=_typed(config, "selection", str),
        selection_options=_typed(config, "selection_options", dict),
        targets=[targets] if isinstance(targets, str) else sorted(map(str, targets)),
        modules=sorted(modules, key=lambda module: -module.update_norm),
        num_modules_by_kind=dict(Counter(m.name.rpartition(".")[2] for m in modules)),
        extra=sorted(extra),
        num_trainable_parameters=sum(module.num_parameters for module in modules) + num_extra,
        file_bytes=find_tensors(folder).stat().st_size,
        base_quantization=format_quantization(quantization) if quantization else None,
    )


def _paca_modules(adapter: Adapter) -> list[ModuleReport]:
    return [
        ModuleReport(
            name=name,
            rank=update.rank,
            scaling=adapter.scaling(name),
            out_features=update.delta.shape[0],
            num_parameters=update.delta.numel() + (0 if update.mix is None else update.mix.numel()),
            update_norm=float(update.dense().double().norm()) * adapter.scaling(name),
            columns=update.indices.tolist(),
        )
        for name, update in adapter.modules.items()
    ]


def _typed(config: dict[str, Any], key: str, *types: type) -> Any:
    # The configuration of another method is not checked, so a value may be anything.
    value = config.get(key)
    return value if isinstance(value, types) and not isinstance(value, bool) else None
