"""Adapted parameters that several share one module: the weights of experts.

    ParameterOwner        in place of the module, which is its `base_layer`
      gate_up_proj        a ParameterLayer, one for each adapted parameter
      down_proj

An adapted parameter is found and saved under the name that it has in the base model. The owner runs
the module's forward in our own words, because the module's own reads its parameters directly.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from torch import Tensor, nn

from pacatune.tuner.config import PacaConfig
from pacatune.tuner.layer import PacaLayer


class ParameterLayer(PacaLayer):
    """One adapted parameter of a module; it holds the deltas and is never called.

    `base_layer` is the module. It is not registered here, since its other parameters share it.
    """

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        name: str,
        config: PacaConfig,
        **options: Any,
    ) -> None:
        self.parameter_name = name.rpartition(".")[2]
        super().__init__(base_layer, adapter_name, name, config, **options)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "base_layer":
            self.__dict__[name] = value
        else:
            super().__setattr__(name, value)

    def get_base_weight(self) -> Tensor:
        """Return the parameter's data."""
        parameter: Tensor = getattr(self.get_base_layer(), self.parameter_name)
        return parameter.data

    def _get_base_layer_device_and_dtype(self, base_layer: nn.Module) -> Any:
        weight = self.get_base_weight()
        return weight.device, weight.dtype

    def extra_repr(self) -> str:
        """Give the shape of the parameter."""
        return f"shape={tuple(self.get_base_weight().shape)}"


def names_to_apply(layer: nn.Module | None) -> list[str]:
    """Return the adapters to be added to a layer's base weight, in order; none for other modules.

    A layer that is merged although it is disabled is unmerged.
    """
    if not isinstance(layer, PacaLayer):
        return []
    if layer._disable_adapters and layer.merged_adapters:
        layer.unmerge()
    if layer._disable_adapters or layer.merged_adapters:
        return []
    return [name for name in layer.active_adapters if name in layer.paca_delta]


class ParameterOwner(nn.Module):
    """In place of a module some of whose parameters are adapted."""

    layer_class: type[ParameterLayer]

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer

    def adapt(
        self, adapter_name: str, name: str, config: PacaConfig, **ranks: Any
    ) -> ParameterLayer:
        """Add an adapter to a parameter."""
        parameter_name = name.rpartition(".")[2]
        layer = self._modules.get(parameter_name)
        if isinstance(layer, ParameterLayer):
            layer.update_layer(adapter_name, name, config, **ranks)
        else:
            layer = self.layer_class(self.base_layer, adapter_name, name, config, **ranks)
            self.add_module(parameter_name, layer)
        return layer

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """Return the module without anything of ours, merged if asked for."""
        for layer in self.children():
            if merge and isinstance(layer, PacaLayer):
                layer.merge(safe_merge=safe_merge, adapter_names=adapter_names)
        return self.base_layer


Owner = TypeVar("Owner", bound=ParameterOwner)


def put_in_place(owner_class: type[Owner], model: nn.Module, name: str) -> Owner:
    """Return the owner in place of a module of the base, putting it there if there is none."""
    module = model.get_submodule(name)
    if not isinstance(module, owner_class):
        module = owner_class(module)
        parent_name, _, child_name = name.rpartition(".")
        setattr(model.get_submodule(parent_name), child_name, module)
    return module


@contextmanager
def in_place_of_forward(module: nn.Module, forward: Any) -> Iterator[None]:
    """Let a module's hooks run, those of accelerate's offloading included, around `forward`."""
    place = "_old_forward" if "_old_forward" in module.__dict__ else "forward"
    missing = object()
    original = module.__dict__.get(place, missing)
    module.__dict__[place] = forward
    try:
        yield
    finally:
        if original is missing:
            del module.__dict__[place]
        else:
            module.__dict__[place] = original
