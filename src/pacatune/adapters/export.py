"""Turn a PaCA adapter into a LoRA adapter that says exactly the same, for any LoRA server.

LoRA adds scaling * B A to a weight. With A (R, I) the 0/1 matrix that selects the trained columns
and B (O, R) = delta, that is PaCA's update and nothing else; alpha and rank stay as they are.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from pacatune.adapters.base import base_name, empty_base, innermost, layer_shape
from pacatune.adapters.compatibility import check_base
from pacatune.adapters.config_file import CONFIG_NAME
from pacatune.adapters.export_check import compare_with_plain_peft
from pacatune.adapters.folder import TENSORS_NAME, Adapter, read_adapter
from pacatune.adapters.output import check_output, staged_folder
from pacatune.adapters.probe import OutputError
from pacatune.adapters.tensor_file import write_tensors
from pacatune.checks import PEFT_PREFIX

ExportDType = Literal["float32", "bfloat16", "float16"]


@dataclass(frozen=True, kw_only=True)
class ExportResult:
    """What an export wrote and how exact it is."""

    output: Path
    """The LoRA adapter's folder."""
    base: str
    """The base whose shapes were used."""
    num_modules: int
    """Adapted modules."""
    num_bytes: int
    """Size of the tensors."""
    rounding: float
    """Largest relative error of a module's B, in the Frobenius norm; 0 in float32."""
    error: OutputError | None
    """Outputs in plain PEFT against PaCA's, both in float32; None if not verified."""
    notes: list[str]
    """What the user should know."""


def export_lora(
    model: str | None,
    adapter: str | Path,
    output: str | Path,
    *,
    dtype: ExportDType = "float32",
    keep_extra: bool = False,
    verify: bool = False,
    device: str = "cpu",
    allow_other_base: bool = False,
) -> ExportResult:
    """Write a PaCA adapter as a LoRA adapter of the same rank.

    Only the base's config.json is read, for the number of in_features, unless `verify` is set.

    Args:
        model: Folder or hub id of the base; None takes the one that the adapter names.
        adapter: Folder or hub id of the adapter.
        output: Folder to write, missing or empty.
        dtype: Of A and B; A is exact in each, B in float32.
        keep_extra: Carry `modules_to_save`, biases and token embeddings over. PEFT loads them,
            vLLM and most other servers do not.
        verify: Load the result with PEFT alone in a new process and compare outputs.
        device: Where to compute the outputs of the PaCA model for that.
        allow_other_base: As for `check_base`.

    Raises:
        FileNotFoundError: If base or adapter are missing.
        FileExistsError: If `output` is in use.
        ValueError: If the adapter is damaged, belongs to another base, or trains what LoRA servers
            do not load, or if the outputs differ by more than rounding.
    """
    checked = read_adapter(adapter)
    name = base_name(model, checked.config)
    output = Path(output)
    check_output(output, num_bytes=0)
    if not keep_extra:
        _refuse_extra(checked)
    base = empty_base(name, task_type=checked.config.task_type)
    notes = check_base(checked, base, allow_other_base=allow_other_base)
    tensors, rounding = _lora_tensors(checked, base, getattr(torch, dtype))
    config = lora_config(checked, base, name, keep_extra=keep_extra)
    num_bytes = sum(tensor.nbytes for tensor in tensors.values())
    error = None
    with staged_folder(output, num_bytes) as staging:
        text = json.dumps(config, indent=2, sort_keys=True)
        (staging / CONFIG_NAME).write_text(text + "\n", encoding="utf-8")
        write_tensors(tensors, staging / TENSORS_NAME)
        if verify:
            error = compare_with_plain_peft(name, checked, staging, dtype, device, allow_other_base)
    return ExportResult(
        output=output,
        base=name,
        num_modules=len(checked.modules),
        num_bytes=num_bytes,
        rounding=rounding,
        error=error,
        notes=notes + _pattern_notes(config),
    )


def column_selector(indices: Tensor, in_features: int) -> Tensor:
    """Return the 0/1 matrix A with A x = x[indices].

    Args:
        indices: (R,) columns.
        in_features: I.

    Returns:
        (R, I) float32.
    """
    selector = torch.zeros(len(indices), in_features)
    selector[torch.arange(len(indices)), indices] = 1
    return selector


def lora_config(
    adapter: Adapter, base: nn.Module, name: str, *, keep_extra: bool = False
) -> dict[str, Any]:
    """Return the adapter_config.json of the LoRA adapter, with keys that any PEFT knows.

    Args:
        adapter: The PaCA adapter.
        base: Its base, weights not needed.
        name: The base's folder or hub id, if the adapter does not name one.
        keep_extra: Whether its other tensors are carried over.
    """
    config = adapter.config
    modules = {name: base.get_submodule(name) for name in adapter.modules}
    result = {
        "peft_type": "LORA",
        "task_type": config.task_type,
        "base_model_name_or_path": config.base_model_name_or_path or name,
        "revision": config.revision,
        "inference_mode": True,
        "r": config.r,
        "lora_alpha": _plain_number(config.paca_alpha),
        "lora_dropout": 0.0,
        "rank_pattern": config.rank_pattern,
        "alpha_pattern": config.alpha_pattern,
        "target_modules": _exact_targets(list(modules), base),
        "fan_in_fan_out": any(type(innermost(m)).__name__ == "Conv1D" for m in modules.values()),
        "init_lora_weights": True,
        "use_rslora": False,
        "use_dora": False,
        "bias": "none",
        "modules_to_save": None,
    }
    if keep_extra:
        result["bias"] = "lora_only" if config.bias == "paca_only" else config.bias
        result["modules_to_save"] = config.modules_to_save
        if config.trainable_token_indices is not None:
            result["trainable_token_indices"] = config.trainable_token_indices
    return result


def _lora_tensors(
    adapter: Adapter, base: nn.Module, dtype: torch.dtype
) -> tuple[dict[str, Tensor], float]:
    tensors, rounding = dict(adapter.extra), 0.0
    for name, (delta, indices) in adapter.modules.items():
        shape = layer_shape(base.get_submodule(name))
        assert shape is not None, "check_base has seen it"
        factor = delta.to(dtype)
        exact = delta.double()
        error = float((factor.double() - exact).norm() / exact.norm().clamp(min=1e-30))
        if not factor.isfinite().all():
            raise ValueError(
                f"{adapter.folder}: module {name!r} holds {float(delta.abs().max()):.0e}, too big "
                f"for {dtype}; export in float32 or bfloat16."
            )
        rounding = max(rounding, error)
        selector = column_selector(indices, shape[1]).to(dtype)
        tensors[f"{PEFT_PREFIX}{name}.lora_A.weight"] = selector
        tensors[f"{PEFT_PREFIX}{name}.lora_B.weight"] = factor
    return tensors, rounding


def _exact_targets(names: list[str], base: nn.Module) -> list[str] | str:
    # A list matches by the end of the name; full names are exact unless they end another name.
    every_name = [name for name, _ in base.named_modules()]
    if any(other.endswith(f".{name}") for name in names for other in every_name):
        return "|".join(map(re.escape, sorted(names)))
    return sorted(names)


def _refuse_extra(adapter: Adapter) -> None:
    if not adapter.extra:
        return
    raise ValueError(
        f"{adapter.folder} also holds {len(adapter.extra)} tensors that are not PaCA's, first "
        f"{next(iter(adapter.extra))!r} (`modules_to_save` = {adapter.config.modules_to_save}, "
        f"`bias` = {adapter.config.bias!r}); vLLM and most LoRA servers do not load them. Pass "
        "`keep_extra` (--keep-extra) to carry them over for PEFT, or merge the adapter instead."
    )


def _pattern_notes(config: dict[str, Any]) -> list[str]:
    if not config["rank_pattern"] and not config["alpha_pattern"]:
        return []
    return [
        "modules differ in rank or alpha: PEFT reads `rank_pattern` and `alpha_pattern`, but some "
        "servers (vLLM) use one rank and one alpha for all."
    ]


def _plain_number(value: float) -> float:
    return int(value) if float(value).is_integer() else value
