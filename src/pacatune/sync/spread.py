"""Values that are spread over a trainer's processes: FSDP2's and tensor parallelism's, ZeRO-3's."""

import importlib
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NoReturn, cast

import torch
from torch import Tensor, nn

from pacatune.ops.columns import read_columns
from pacatune.sync.message import ColumnSet


def reshard(model: nn.Module) -> None:
    """Have FSDP2 show its shards: what it gathered is not what the optimiser has changed."""
    try:
        from torch.distributed.fsdp import FSDPModule
    except ImportError:
        return
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def is_spread(tensor: Any) -> bool:
    """Whether each process has a part of a tensor."""
    return hasattr(tensor, "placements") or hasattr(tensor, "ds_id")


def identity_of(weight: Any) -> tuple[Any, ...]:
    """Tell one pretrained weight from another."""
    local = weight.to_local() if hasattr(weight, "to_local") else weight
    if hasattr(weight, "ds_id"):  # DeepSpeed's own; its memory comes and goes
        return ("ds", weight.ds_id)
    return local._version, local.data_ptr()


def gathered(*parameters: Any) -> AbstractContextManager[Any]:
    """Let DeepSpeed gather what it has partitioned."""
    found = [one for one in parameters if hasattr(one, "ds_id")]
    if not found:
        return nullcontext()
    deepspeed = importlib.import_module("deepspeed")

    return cast("AbstractContextManager[Any]", deepspeed.zero.GatheredParameters(found))


def whole(parameter: Any, name: str) -> Tensor:
    """Return all values of a parameter that may be spread."""
    delta = parameter.detach()
    if hasattr(delta, "full_tensor"):
        return cast(Tensor, delta.full_tensor())
    if not delta.numel():
        refuse_empty(name)
    # What DeepSpeed has gathered is gone afterwards.
    return cast(Tensor, delta.clone() if hasattr(parameter, "ds_id") else delta)


def gather_columns(weight: Any, indices: Tensor, one: ColumnSet) -> Tensor:
    """Return columns of a weight of which each process has a part; only they are sent.

    Of row groups, whose parts are of many forms, the whole weight is gathered for a moment.
    """
    if not hasattr(weight, "placements"):
        return columns_of(weight, indices, one)
    if one.is_grouped:
        return columns_of(weight.detach().full_tensor(), indices, one)
    from torch.distributed.tensor import Partial

    mesh, placements, dim = weight.device_mesh, list(weight.placements), one.dim
    local = weight.detach().to_local()
    splitting = [number for number, p in enumerate(placements) if p.is_shard() and p.dim == dim]
    if not splitting:
        columns = local.index_select(dim, indices)
        return _full(columns, mesh, placements, one.columns_shape)
    if len(splitting) > 1:
        raise ValueError(
            f"{one.name!r} is split along its columns over {len(splitting)} dimensions of the mesh "
            f"({placements}), which is not supported; split them over one."
        )
    (number,) = splitting
    width = -(-weight.shape[dim] // mesh.size(number))
    own = indices - mesh.get_local_rank(number) * width
    places = ((own >= 0) & (own < width)).nonzero().flatten()
    shape = list(local.shape)
    shape[dim] = len(indices)
    columns = local.new_zeros(shape)
    columns.index_copy_(dim, places, local.index_select(dim, own[places]))
    # Each column is on one process. Bytes, since a sum of numbers would lose the sign of -0.0.
    placements[number] = Partial("sum")
    size = one.columns_shape
    wide = (*size[:-1], size[-1] * columns.itemsize)
    return _full(columns.view(torch.uint8), mesh, placements, wide).view(weight.dtype)


def columns_of(weight: Any, indices: Tensor, one: ColumnSet) -> Tensor:
    """Return columns of a weight that is whole here."""
    return read_columns(weight.detach(), indices, dim=one.dim, row_dim=one.row_dim)


def _full(local: Tensor, mesh: Any, placements: list[Any], shape: tuple[int, ...]) -> Tensor:
    from torch.distributed.tensor import DTensor

    whole = DTensor.from_local(
        local.contiguous(),
        mesh,
        placements,
        run_check=False,
        shape=torch.Size(shape),
        stride=torch.empty(shape, device="meta").stride(),
    )
    return whole.full_tensor()


def refuse_empty(name: str) -> NoReturn:
    """Refuse a tensor whose values only DeepSpeed can bring here."""
    raise ValueError(
        f"{name!r} is empty here, its values are spread over the processes; call this inside "
        "deepspeed.zero.GatheredParameters(list(model.parameters()))."
    )
