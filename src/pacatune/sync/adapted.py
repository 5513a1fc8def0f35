"""What a trainer has adapted, and what checkpoints call it; what no server could exchange."""

from collections.abc import Iterator, Mapping
from typing import Any, cast

import torch
from torch import nn

from pacatune.format.tensors import plain_name
from pacatune.ops.whole import whole_shape
from pacatune.sync.spread import refuse_empty
from pacatune.tuner.compat import as_saved
from pacatune.tuner.layer import PacaLayer
from pacatune.tuner.model import is_foreign


def base_of(model: Any) -> nn.Module:
    """Return the base model inside wrappers (DDP, torch.compile, PEFT)."""
    while not callable(getattr(model, "get_base_model", None)):
        inner = model._modules.get("_orig_mod") or model._modules.get("module")
        if inner is None:
            return cast(nn.Module, model)
        model = inner
    return cast(nn.Module, model.get_base_model())


def layers_of(model: nn.Module, adapter: str | None) -> Iterator[tuple[str, PacaLayer, str]]:
    """Yield each layer that has the adapter, its parameter's name, and that of the adapter."""
    num_layers = num_found = 0
    for name, module in base_of(model).named_modules():
        if is_foreign(module):
            raise ValueError(
                f"{name!r} is a layer of PEFT's own PaCA; make the adapter with "
                "`pacatune.PacaConfig`, which loads its adapters too."
            )
        if not isinstance(module, PacaLayer):
            continue
        num_layers += 1
        names = [adapter] if adapter else list(module.active_adapters)
        names = [adapter_name for adapter_name in names if adapter_name in module.paca_delta]
        if len(names) > 1:
            raise ValueError(
                f"{len(names)} adapters are active ({', '.join(names)}), whose columns may "
                "overlap; name one by `adapter`, or add them up by `model.add_weighted_adapter`."
            )
        if names:
            num_found += 1
            is_own = name.rpartition(".")[2] == module.parameter_name
            full = name if is_own else f"{name}.{module.parameter_name}"
            yield plain_name(full), module, names[0]
    if not num_layers:
        raise ValueError(
            "the model has no PaCA layers; adapt it first: `get_peft_model(model, "
            "PacaConfig(...))`. LoRA and full fine-tuning change every column."
        )
    if not num_found:
        which = f"adapter {adapter!r}" if adapter else "active adapter"
        raise ValueError(f"no layer has an {which} of PaCA; check its name, or `set_adapter` it.")


def refuse_more(model: nn.Module) -> None:
    """Refuse a model that trains more than columns."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and "paca_delta" not in name:
            raise ValueError(
                f"the model also trains {name!r}, which is no column, so a server would lack it; "
                "train columns alone (no `bias`, no `modules_to_save`), or send whole tensors."
            )


def refuse_weight(layer: Any, parameter: str, weight: Any) -> None:
    """Refuse a weight without columns that a server could exchange."""
    backend = layer.quantization_backend
    if backend is not None and backend.backend_name != "bnb 4bit":
        raise ValueError(
            f"{parameter!r} is quantised ({backend.backend_name}), and trained by kernels of its "
            "own, which no server in 16 bits repeats. Train on the base in 16 bits or in "
            "bitsandbytes' 4, or serve the adapter (`pacatune export --to lora`)."
        )
    if (why := layer.layout.why_no_columns) is not None:
        raise ValueError(
            f"{parameter!r} is the kernel of {why}, whose trained channels are no columns of it; "
            "leave it out of the targets."
        )
    if layer.shares_weight:
        raise ValueError(
            f"{parameter!r} is tied to another module (lm_head and embedding), and a server has "
            "one tensor for both; leave it out of the targets."
        )
    if weight is None or weight.is_meta:
        raise ValueError(
            f"{parameter!r} has no values here: it is offloaded, or on the meta device; keep the "
            "trained model on its devices."
        )
    if weight.numel() and len(whole_shape(weight)) != len(layer.layout.dense_shape):
        raise ValueError(
            f"{parameter!r} is a view of shape {tuple(weight.shape)} into a flat tensor (FSDP 1); "
            "use FSDP 2 (`fully_shard`, `fsdp_version: 2`)."
        )
    if not weight.numel() and not hasattr(weight, "ds_shape"):
        refuse_empty(parameter)


def checkpoint_name(base: Any, parameter: str, shape: tuple[int, ...]) -> str:
    """Return what the checkpoint calls a parameter that it holds as it is, else its own name."""
    if not hasattr(base, "config"):
        return parameter
    tensor = torch.empty(shape, device="meta")
    try:
        saved = as_saved(base, {parameter: tensor})
    except Exception:  # of a conversion that wants the parameters beside this one
        return parameter
    ((name, other),) = saved.items() if len(saved) == 1 else ((parameter, tensor),)
    return name if other.shape == tensor.shape else parameter


def shapes_beside(base: nn.Module, parameters: list[str]) -> Mapping[str, tuple[int, ...]]:
    """Return the shapes of all matrices whose modules are beside adapted ones."""

    def owner(name: str) -> str:
        return name.rpartition(".")[0].rpartition(".")[0]

    owners = {owner(name) for name in parameters}
    shapes = {}
    for name, parameter in base.named_parameters():
        plain, shape = plain_name(name), whole_shape(parameter)
        if "paca_delta" not in name and len(shape) > 1 and owner(plain) in owners:
            shapes[plain] = shape
    return shapes
