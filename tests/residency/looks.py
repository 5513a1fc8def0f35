"""The ways to look at a model's base weights."""

import copy
import io
import pickle
from collections.abc import Callable

import torch
from torch import Tensor, nn

from tests.residency.net import Net

LOOKS: dict[str, Callable[[nn.Module], dict[str, Tensor]]] = {
    "state_dict": lambda m: m.state_dict(),
    "parameters": lambda m: dict(m.named_parameters()),
    "deepcopy": lambda m: copy.deepcopy(m).state_dict(),
    "pickle": lambda m: pickle.loads(pickle.dumps(m)).state_dict(),
    "torch.save": lambda m: torch.load(_saved(m), weights_only=False).state_dict(),
    "attribute": lambda m: {
        f"base_model.model.{name}.base_layer.weight": getattr(
            m.base_model.model, name
        ).base_layer.weight
        for name in ("first", "second")
    },
}


def _saved(model: nn.Module) -> io.BytesIO:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return buffer


def assert_sees_base(base: Net, seen: dict[str, Tensor]) -> None:
    for name in ("first", "second"):
        weight = seen[f"base_model.model.{name}.base_layer.weight"]
        assert torch.equal(weight, base.get_submodule(name).weight)
