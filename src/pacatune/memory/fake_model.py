"""A model of the meta device as fake tensors: storages that have a size and no memory.

Fake tensors and not those of the meta device, because they take part in autocast. Modules keep
their classes and code. What cannot work without memory is PaCA's watch over who else holds a
weight; `FakeResidency` takes the answers of a training run on one device, where nobody does.
"""

from typing import Any

import torch
from torch import Tensor, nn

from pacatune.memory.methods import is_quantized, quantized_weight
from pacatune.memory.setting import Setting
from pacatune.residency import Residency
from pacatune.tuner.layer import PacaLayer

__all__ = ["FakeResidency", "Held", "kept_aside", "materialize"]


class Held:
    """The tensors that a model holds throughout training, by what they are."""

    def __init__(self) -> None:
        self.weights: list[Tensor] = []
        self.adapter: list[Tensor] = []


class FakeResidency(Residency):
    """A Residency over a fake weight; its columns and originals have their real sizes."""

    def find_weight(self) -> Tensor | None:
        """Return the weight: a frozen one, in a run whose memory can be estimated."""
        assert self.parameters is not None
        self.weight = dict.get(self.parameters, "weight")
        return self.weight

    def _may_write(self, delta: Any) -> bool:
        delta.num_unversioned = 0  # the number of optimisers that step in a simulated step
        return self.find_weight() is not None and self.is_writable()

    @staticmethod
    def _address_of(weight: Tensor) -> int:
        return 0  # there is no memory


def materialize(model: nn.Module, setting: Setting) -> Held:
    """Replace every parameter and buffer by a fake tensor; call it in a FakeTensorMode.

    Args:
        model: On the meta device; changed in place.
        setting: Method, dtypes, sharding.

    Returns:
        What the model holds from now on.
    """
    held, replaced = Held(), dict[int, tuple[Tensor, Tensor]]()
    for module in model.modules():
        if is_quantized(module):
            packed, scales = quantized_weight(module, setting)
            module.__dict__["_parameters"]["weight"] = packed
            held.weights += [packed, *scales]
        # Past the guard of adapted layers, which would take the new parameter for a sharded one.
        parameters, buffers = module.__dict__["_parameters"], module.__dict__["_buffers"]
        for name, value in [*dict.items(parameters), *buffers.items()]:
            if value is None or not value.is_meta:
                continue
            if id(value) not in replaced:
                replaced[id(value)] = (_fake(value, setting), value)
                own = held.adapter if _is_of_adapter(value, setting) else held.weights
                own.append(replaced[id(value)][0])
            target = parameters if name in dict.keys(parameters) else buffers
            dict.__setitem__(target, name, replaced[id(value)][0])
    _make_resident(model, setting)
    return held


def _fake(value: Tensor, setting: Setting) -> Tensor:
    is_parameter = isinstance(value, nn.Parameter)
    trained = is_parameter and value.requires_grad
    dtype = setting.trained_dtype if trained else value.dtype
    fake = torch.empty_like(value, device="cpu", dtype=dtype, requires_grad=False)
    return nn.Parameter(fake, requires_grad=trained) if is_parameter else fake


def _is_of_adapter(value: Tensor, setting: Setting) -> bool:
    return setting.row.has_adapter and value.requires_grad


def _make_resident(model: nn.Module, setting: Setting) -> None:
    for layer in model.modules():
        if isinstance(layer, PacaLayer) and layer.residency is not None:
            layer.residency = FakeResidency(layer.get_base_layer())
            layer.residency.is_shared = layer.shares_weight
            layer.residency.is_sharded = setting.sharding in ("zero3", "fsdp2")


def kept_aside(model: nn.Module) -> list[Tensor]:
    """Write all columns, as a training step before has; return what is kept aside for that.

    The next forward pass writes them again, as after an optimiser step.
    """
    kept: list[Tensor] = []
    for layer in model.modules():
        residency = getattr(layer, "residency", None)
        if not isinstance(layer, PacaLayer) or not isinstance(residency, FakeResidency):
            continue
        (name,) = layer.r
        residency.write(layer.delta_of(name), layer.paca_indices[name], layer.scaling[name])
        residency.is_stale = residency.is_written
        if residency.kept is not None:
            kept += [residency.kept.originals, residency.kept.columns]
    return kept
