"""What the names in an adapter's file mean in a base model: layers, and bare parameters.

A layer's name stands for its weight. The fused weights of experts and the `in_proj_weight` of
torch's attention have no layer of their own and are named themselves.
"""

from typing import Any

import torch
from torch import Tensor, nn

from pacatune.adapters.base import innermost, layer_shape
from pacatune.format.options import IN_PROJ
from pacatune.ops.columns import read_columns
from pacatune.tuner.experts import features_of, is_expert_parameter, is_transposed

__all__ = ["find_target", "read_target_columns", "target_matrix", "target_shape"]


def find_target(model: nn.Module, name: str) -> tuple[Any, str] | None:
    """Return the base's module that a name means and the name of its adapted weight, or None.

    Args:
        model: The base, adapted or not.
        name: Such as `model.layers.0.self_attn.q_proj` or `model.layers.0.mlp.experts.down_proj`.
    """
    owner, _, last = name.rpartition(".")
    try:
        layer = model.get_submodule(name)
        return innermost(layer), getattr(layer, "parameter_name", "weight")
    except AttributeError:
        pass
    try:
        module = innermost(model.get_submodule(owner))
    except AttributeError:
        return None
    return (module, last) if last == IN_PROJ or is_expert_parameter(module, last) else None


def target_shape(model: nn.Module, name: str) -> tuple[int, ...] | None:
    """Return the shape of a target's update if every column were trained, None if there is none.

    Args:
        model: The base, adapted or not; weights are not needed.
        name: As for `find_target`.

    Returns:
        (O, I), (O/G, I, *k) of a convolution, (O, I, E) of E experts, (V, D) of an embedding.
    """
    found = find_target(model, name)
    if found is None:
        return None
    module, parameter_name = found
    if is_expert_parameter(module, parameter_name):
        num_experts, in_features, out_features = features_of(module, parameter_name)
        return out_features, in_features, num_experts
    if isinstance(module, nn.MultiheadAttention):
        return 3 * module.embed_dim, module.embed_dim
    if isinstance(module, nn.Embedding):
        return module.num_embeddings, module.embedding_dim
    return layer_shape(module)


def read_target_columns(model: nn.Module, name: str, indices: Tensor) -> Tensor:
    """Return what the weight of a target holds in some columns, in the shape of the update.

    Args:
        model: The base, adapted or not.
        name: As for `find_target`; there must be such a target.
        indices: (R,) columns.
    """
    found = find_target(model, name)
    assert found is not None, "check_shapes has seen it"
    module, parameter_name = found
    weight: Tensor = getattr(module, parameter_name).detach()
    indices = indices.to(weight.device)
    if is_expert_parameter(module, parameter_name):
        return _experts_last(weight, module).index_select(1, indices)
    if weight.dim() > 2:
        return read_columns(weight, indices, module.groups)
    if type(module).__name__ == "Conv1D":
        return weight.index_select(0, indices).t()
    return weight.index_select(1, indices)


def target_matrix(module: Any, parameter_name: str) -> Tensor | None:
    """Return the weight of a layer, or of the first of many experts, as it is; None if it is none.

    Args:
        module: As `find_target` returns it.
        parameter_name: Likewise.
    """
    weight = getattr(module, parameter_name, None)
    if not isinstance(weight, torch.Tensor):
        return None
    if is_expert_parameter(module, parameter_name) and weight.dim() == 3:
        return _experts_last(weight, module)[..., 0]
    return weight


def _experts_last(weight: Tensor, experts: Any) -> Tensor:
    return weight.permute(2, 1, 0) if is_transposed(experts) else weight.permute(1, 2, 0)
