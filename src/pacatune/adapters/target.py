"""What the names in an adapter's file mean in a base model: layers, and bare parameters.

A layer's name stands for its weight. The fused weights of experts and the `in_proj_weight` of
torch's attention have no layer of their own and are named themselves.
"""

from contextlib import suppress
from typing import Any, NamedTuple

from torch import Tensor, nn

from pacatune.adapters.base import innermost
from pacatune.adapters.folder import Adapter
from pacatune.names import nearest
from pacatune.tuner.layout import Layout, layout_of


class BaseWeight(NamedTuple):
    """A weight of the base that an adapter changes."""

    module: Any
    """The module that it belongs to."""
    parameter_name: str
    """Its name there."""
    layout: Layout
    """Its sizes, and where its columns are."""


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
        found = dict(model.named_modules())
        problem = "adaptable layer" if name in found else "module"
        raise ValueError(
            f"the base ({type(model).__name__}) has no {problem} {name!r}; the nearest name is "
            f"{nearest(name, found, cutoff=0)!r}. The adapter belongs to another base."
        )
    return BaseWeight(module, parameter_name, layout)


def read_target_columns(target: BaseWeight, indices: Tensor) -> Tensor:
    """Return some columns of a weight, as its layout has them."""
    weight: Tensor = getattr(target.module, target.parameter_name).detach()
    return target.layout.read_columns(weight, indices.to(weight.device))


def adapted_target_columns(
    target: BaseWeight, adapter: Adapter, name: str
) -> tuple[Tensor, Tensor]:
    """Return which columns of a weight an adapter changes, and their bits in a merge."""
    delta, indices, _ = adapter.modules[name].whole()
    columns = read_target_columns(target, indices)
    update = target.layout.from_file(delta.float()).to(columns.device)  # as a layer holds it
    return indices, target.layout.adapted(columns, update, adapter.scaling(name))
