"""Describe an adapter folder without its base model."""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from pacatune.adapters.folder import (
    CONFIG_NAME,
    FINGERPRINT_KEY,
    SIDECAR_NAME,
    Adapter,
    find_tensors,
    is_parameter,
    locate_folder,
    read_adapter,
)
from pacatune.files.json_file import read_json_object
from pacatune.files.plain import find_file
from pacatune.files.tensor_file import read_tensors
from pacatune.format.options import FILE_TYPES, PacaOptions, format_quantization, idle_layers
from pacatune.format.tensors import PEFT_PREFIX, check_finite


@dataclass(frozen=True, kw_only=True)
class ModuleReport:
    """One adapted module."""

    name: str
    """In the base model, such as `model.layers.0.self_attn.q_proj`."""
    rank: int
    """Trained columns, or the rank of a LoRA update."""
    scaling: float
    """Factor of the update, alpha / rank."""
    out_features: int
    """Outputs of the module; of one group, for a convolution with groups."""
    num_parameters: int
    """Trained numbers."""
    update_norm: float
    """Frobenius norm of W' - W."""
    columns: list[int] | None
    """The trained columns; None for other methods than PaCA."""


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
    random_seed: int | None
    """PaCA: chose the columns; None where they were not chosen by a seed."""
    selection: str | None
    """PaCA: the strategy that chose the columns; "fixed" where they were given."""
    selection_options: dict[str, Any] | None
    """PaCA: what they were chosen from, such as the number of batches."""
    targets: list[str]
    """`target_modules` of the configuration."""
    modules: list[ModuleReport]
    """Adapted modules, largest update first."""
    num_modules_by_kind: dict[str, int]
    """Number of adapted modules by the last part of their name."""
    extra: list[str]
    """Other tensors: biases, `modules_to_save`, token embeddings."""
    num_trainable_parameters: int
    """Trained numbers, extra tensors included."""
    file_bytes: int
    """Size of the tensor file."""
    notes: list[str]
    """What it needs and what it fits."""


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
    if method in FILE_TYPES:
        adapter = read_adapter(folder)
        config, alpha = {**vars(adapter.config), "peft_type": "PACA"}, adapter.config.paca_alpha
        modules, extra, notes = _paca_modules(adapter), adapter.extra, _paca_notes(adapter)
        copies = adapter.copies()
    elif isinstance(method, str):
        modules, extra = _lora_modules(find_tensors(folder), alpha)
        notes = _lora_notes(config)
        # PEFT copies the frozen weight of an adapted embedding or head into the file.
        copies = [name for name in extra if name.endswith(".base_layer.weight")]
    else:
        raise ValueError(
            f"{folder / CONFIG_NAME} gives `peft_type` = {method!r}; it must name a PEFT method."
        )
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
        random_seed=_typed(config, "random_seed", int),
        selection=_typed(config, "selection", str),
        selection_options=_typed(config, "selection_options", dict),
        targets=[targets] if isinstance(targets, str) else sorted(map(str, targets)),
        modules=sorted(modules, key=lambda module: -module.update_norm),
        num_modules_by_kind=dict(Counter(m.name.rpartition(".")[2] for m in modules)),
        extra=sorted(extra),
        num_trainable_parameters=sum(module.num_parameters for module in modules) + num_extra,
        file_bytes=find_tensors(folder).stat().st_size,
        notes=notes,
    )


def _paca_modules(adapter: Adapter) -> list[ModuleReport]:
    return [
        ModuleReport(
            name=name,
            rank=update.rank,
            scaling=adapter.scaling(name),
            out_features=update.delta.shape[0],
            num_parameters=update.delta.numel(),
            update_norm=float(update.delta.double().norm()) * adapter.scaling(name),
            columns=update.indices.tolist(),
        )
        for name, update in adapter.modules.items()
    ]


def _lora_modules(path: Path, alpha: float | None) -> tuple[list[ModuleReport], dict[str, Tensor]]:
    """Return the modules whose factors a file holds, and its other tensors."""
    extra = read_tensors(path)
    check_finite(extra, source=str(path))
    modules = []
    for key, factor_b in list(extra.items()):
        name = key.removesuffix(".lora_B.weight")
        factor_a = extra.get(f"{name}.lora_A.weight")
        if name == key or factor_a is None or not _is_product(factor_b, factor_a):
            continue
        parts = [extra.pop(key), extra.pop(f"{name}.lora_A.weight")]
        module_rank = factor_a.shape[0]
        scaling = alpha / module_rank if alpha is not None and module_rank else 1.0
        modules.append(
            ModuleReport(
                name=name.removeprefix(PEFT_PREFIX),
                rank=module_rank,
                scaling=scaling,
                out_features=factor_b.shape[0],
                num_parameters=sum(part.numel() for part in parts),
                update_norm=scaling * _product_norm(factor_b, factor_a),
                columns=None,
            )
        )
    return modules, extra


def _lora_notes(config: dict[str, Any]) -> list[str]:
    notes = [f"a {config['peft_type']} adapter: PEFT reads it without pacatune."]
    if config.get("alpha_pattern") or config.get("use_rslora") or config.get("use_dora"):
        notes.append("its scaling follows options that are not read here; norms are approximate.")
    return notes


def _paca_notes(adapter: Adapter) -> list[str]:
    config, notes = adapter.config, []
    if config.base_quantization:
        how = format_quantization(config.base_quantization)
        start = "the checkpoint's" if config.columns_from == "original" else "its own"
        notes.append(f"trained on a base quantised as {how}; columns started from {start} weights.")
    if idle := idle_layers(config):
        notes.append(f"{idle} has no effect: `target_modules` is a regular expression.")
    has_convolutions = any(
        update.delta.ndim > 2 and not is_parameter(config, name)
        for name, update in adapter.modules.items()
    )
    notes.append(_readers(config, has_convolutions=has_convolutions))
    if copies := adapter.copies():
        notes.append(
            f"holds {len(copies)} weights of the base that it does not train, first {copies[0]!r}: "
            "PEFT puts them over the base's, `merge` and `generate` refuse others than the base's, "
            "`export` leaves them out."
        )
    if len(adapter.extra) > len(copies):
        notes.append(
            "holds more than PaCA's tensors: `export` needs --keep_extra, `merge` does not."
        )
    else:
        limit = ", dilated or oddly padded convolutions excepted" if has_convolutions else ""
        notes.append(
            f"can be exported as an exact LoRA adapter{limit}: `pacatune export --to lora`."
        )
    if FINGERPRINT_KEY not in adapter.sidecar:
        notes.append(
            f"no {SIDECAR_NAME} with a fingerprint: another base of equal shapes is not seen."
        )
    if not any(update.delta.any() for update in adapter.modules.values()):
        notes.append("every delta is zero: the adapter is untrained and changes nothing.")
    return notes


def _readers(config: PacaOptions, *, has_convolutions: bool) -> str:
    """Say which PEFT reads the adapter without us, as far as its file tells."""
    needs = config.needs_pacatune()
    if has_convolutions and config.needs_pacatune_for is None:
        needs.append("convolutions")
    if needs:
        return (
            "needs pacatune: PEFT's own PaCA (0.22 and newer) does not know "
            f"{', '.join(needs)}, or computes something else there."
        )
    if config.needs_pacatune_for is None:
        return (
            "PEFT 0.22 and newer read it without pacatune if all its modules are plain or "
            "quantised linear layers, which the file does not say; older PEFT needs it imported."
        )
    return "PEFT 0.22 and newer read it without pacatune; older PEFT needs it imported."


def _typed(config: dict[str, Any], key: str, *types: type) -> Any:
    # The configuration of another method is not checked, so a value may be anything.
    value = config.get(key)
    return value if isinstance(value, types) and not isinstance(value, bool) else None


def _product_norm(left: Tensor, right: Tensor) -> float:
    """Frobenius norm of left @ right, (O, R) and (R, I), without forming the (O, I) product.

    Of a convolution: (O, R/G, 1, ...) and (R, I, *k), a product for each of the G groups.
    """
    groups = len(right) // left.shape[1]
    left = left.double().flatten(1).unflatten(0, (groups, -1))
    right = right.double().flatten(1).unflatten(0, (groups, -1))
    squared = ((left.mT @ left) * (right @ right.mT)).sum()
    return float(squared.clamp(min=0).sqrt())


def _is_product(left: Tensor, right: Tensor) -> bool:
    """Whether these are the factors of a linear layer or of a convolution."""
    is_pointwise = all(size == 1 for size in left.shape[2:])
    if left.ndim == 2 or left.ndim != right.ndim:
        return right.shape[:1] == left.shape[1:]
    return is_pointwise and left.shape[1] > 0 and len(right) % left.shape[1] == 0
