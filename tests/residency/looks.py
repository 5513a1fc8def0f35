"""The ways to look at a model's base weights."""

import copy
import io
import operator
import pickle
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tests.residency.net import Net, layers

LOOKS: dict[str, Callable[[nn.Module], dict[str, Tensor]]] = {
    "state_dict": lambda m: m.state_dict(),
    "parameters": lambda m: dict(m.named_parameters()),
    "deepcopy": lambda m: copy.deepcopy(m).state_dict(),
    "pickle": lambda m: pickle.loads(pickle.dumps(m)).state_dict(),
    "torch.save": lambda m: torch.load(_saved(m), weights_only=False).state_dict(),
    "to": lambda m: m.to("cpu").state_dict(),
    "attribute": lambda m: {
        f"base_model.model.{name}.base_layer.weight": layer.base_layer.weight
        for name, layer in zip(("first", "second"), layers(m), strict=True)
    },
}
# What may still be used when training has gone on, whatever its weights hold by then.
COPIED = ("deepcopy", "pickle", "torch.save")

HANDED_OUT: dict[str, Callable[[dict[str, Any]], Tensor | None]] = {
    "[]": lambda parameters: parameters["weight"],
    "get": lambda parameters: parameters.get("weight"),
    "items": lambda parameters: dict(parameters.items())["weight"],
    "values": lambda parameters: next(iter(parameters.values())),
    "pop": lambda parameters: parameters.pop("weight"),
    "popitem": lambda parameters: dict(parameters.popitem() for _ in range(2))["weight"],
    "setdefault": lambda parameters: parameters.setdefault("weight"),
    "dict": lambda parameters: dict(parameters)["weight"],
    "**": lambda parameters: {**parameters}["weight"],
    "|": lambda parameters: (parameters | {})["weight"],
    "{} |": lambda parameters: ({} | parameters)["weight"],
    "|=": lambda parameters: operator.ior({}, parameters)["weight"],
    "dict.copy": lambda parameters: dict.copy(parameters)["weight"],
    "copy": lambda parameters: parameters.copy()["weight"],
    "copy.copy": lambda parameters: copy.copy(parameters)["weight"],
    "pickle": lambda parameters: pickle.loads(pickle.dumps(parameters))["weight"],
    "repr": lambda parameters: repr(parameters) and None,
    "del": lambda parameters: operator.delitem(parameters, "weight"),
    "=": lambda parameters: operator.setitem(parameters, "weight", nn.Parameter(torch.zeros(2))),
}
"""The ways to get at the weight in a module's parameters."""


def _saved(model: nn.Module) -> io.BytesIO:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return buffer


def assert_sees_base(base: Net, seen: dict[str, Tensor]) -> None:
    for name in ("first", "second"):
        weight = seen[f"base_model.model.{name}.base_layer.weight"]
        assert torch.equal(weight, base.get_submodule(name).weight)
