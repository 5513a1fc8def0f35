"""What the names in an adapter's file mean in a base model: layers, and bare parameters.

A layer's name stands for its weight. The fused weights of experts have no layer of their own and
are named themselves.
"""

from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub import try_to_load_from_cache
from torch import Tensor, nn

from pacatune.adapters.base import base_name, empty_base, innermost, num_labels_of
from pacatune.adapters.folder import Adapter, LoraAdapter
from pacatune.files.checkpoint import DTYPES, Checkpoint
from pacatune.files.journal import is_gguf
from pacatune.names import find_name, names_of, nearest
from pacatune.tuner.compat import resolve_quantization_backend
from pacatune.tuner.layout import Layout, layout_of
from pacatune.tuner.quantized import dequantized


class BaseWeight(NamedTuple):
    """A weight of the base that an adapter changes."""

    module: Any
    """The module that it belongs to."""
    parameter_name: str
    """Its name there."""
    layout: Layout
    """Its sizes, and where its columns are."""

    @property
    def weight(self) -> Tensor:
        """The weight itself."""
        weight: Tensor = getattr(self.module, self.parameter_name)
        return weight.detach()

    def columns(self, indices: Tensor) -> Tensor:
        """Return some columns, as the layout has them; of a weight in few bits float32 ones."""
        backend, weight = resolve_quantization_backend(self.module), self.weight
        if backend is not None:
            weight = dequantized(backend, self.module, torch.float32)
        return self.layout.read_columns(weight, indices.to(weight.device))

    def adapted(self, columns: Tensor, adapter: Adapter, name: str) -> Tensor:
        """Return what an adapter makes of the columns that it trains, in their dtype."""
        update = self.layout.from_file(adapter.modules[name].dense().float())  # as a layer holds it
        return self.layout.adapted(columns, update.to(columns.device), adapter.scaling(name))

    def full_name(self, name: str) -> str:
        """Return the parameter's name in the model, given what the adapter calls it."""
        is_own = name.rpartition(".")[2] == self.parameter_name  # a parameter without a layer
        return name if is_own else f"{name}.{self.parameter_name}"


def target_of_module(model: nn.Module, name: str) -> BaseWeight:
    """Return the base's weight that a name means; refuse a base without one to be adapted."""
    owner, _, parameter_name = name.rpartition(".")
    module = layout = None
    with suppress(AttributeError):
        module = innermost(model.get_submodule(owner))
    with suppress(AttributeError):
        layer = model.get_submodule(name)
        module, parameter_name = innermost(layer), getattr(layer, "parameter_name", "weight")
    if module is not None:
        layout = layout_of(module, parameter_name)
    if layout is None:
        modules = dict(model.named_modules())
        problem = "adaptable layer" if name in modules else "module"
        raise ValueError(
            f"the base ({type(model).__name__}) has no {problem} {name!r}; the nearest name is "
            f"{nearest(name, modules, cutoff=0)!r}. The adapter belongs to another base."
        )
    return BaseWeight(module, parameter_name, layout)


def named_base(
    model: str | nn.Module | None, adapter: Adapter | LoraAdapter
) -> tuple[str, nn.Module]:
    """Return the name of an adapter's base, and its modules.

    The modules are those given. Else they have no weights but those that PaCA adapts, mapped from
    their files where these are here. The name is empty where modules are given and the adapter
    names no base.
    """
    if isinstance(model, nn.Module):
        return adapter.config.base_model_name_or_path or "", model
    name = base_name(model, adapter.config)
    num_labels = num_labels_of(name, adapter)
    base = empty_base(name, task_type=adapter.config.task_type, num_labels=num_labels)
    if isinstance(adapter, Adapter) and not is_gguf(name):
        cached = None if Path(name).is_dir() else try_to_load_from_cache(name, "config.json")
        folder = Path(cached).parent if isinstance(cached, str) else Path(name)
        with suppress(FileNotFoundError):
            checkpoint = Checkpoint.open(folder)
            map_weights_(base, checkpoint, stored_names(base, adapter.modules, checkpoint))
    return name, base


def stored_names(
    model: nn.Module, modules: Iterable[str], checkpoint: Checkpoint
) -> dict[str, str]:
    """Return the checkpoint's name of each adapted weight that it has, by the adapter's name."""
    prefix, names = str(getattr(model, "base_model_prefix", "")), {}
    for module in modules:
        own = target_of_module(model, module).full_name(module)
        if (name := find_name(names_of(own, prefix), checkpoint.entries)) is not None:
            names[module] = name
    return names


def map_weights_(model: nn.Module, checkpoint: Checkpoint, names: Mapping[str, str]) -> int:
    """Give a model those weights that a checkpoint holds in its form; return how many these are.

    They are mapped, so that only what is looked at is read.
    """
    num_mapped = 0
    for module, name in names.items():
        target, entry = target_of_module(model, module), checkpoint.entries[name]
        if entry.dtype in DTYPES and entry.shape == target.weight.shape:
            weight = nn.Parameter(checkpoint.tensor(name), requires_grad=False)
            setattr(target.module, target.parameter_name, weight)
            num_mapped += 1
    return num_mapped
