"""Values that are spread over a trainer's processes: FSDP2's and ZeRO-3's."""

import importlib
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NoReturn, cast

from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from pacatune.ops.columns import read_columns
from pacatune.sync.message import ColumnSet


def reshard(model: nn.Module) -> None:
    """Have FSDP2 show its shards: what it gathered is not what the optimiser has changed."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def identity_of(weight: Any) -> tuple[Any, ...]:
    """Tell one pretrained weight from another."""
    local = weight.to_local() if hasattr(weight, "to_local") else weight
    if hasattr(weight, "ds_id"):  # DeepSpeed's own; its memory comes and goes
        return ("ds", weight.ds_id)
    return local._version, local.data_ptr()


def gathered(*parameters: Any) -> AbstractContextManager[Any]:
    """Let DeepSpeed gather what it has partitioned."""
    partitioned = [parameter for parameter in parameters if hasattr(parameter, "ds_id")]
    if not partitioned:
        return nullcontext()
    deepspeed = importlib.import_module("deepspeed")
    return cast("AbstractContextManager[Any]", deepspeed.zero.GatheredParameters(partitioned))


def whole(parameter: Any, name: str) -> Tensor:
    """Return all values of a parameter that may be spread; ZeRO-3's must be `gathered`."""
    values = parameter.detach()
    if hasattr(values, "full_tensor"):
        return cast(Tensor, values.full_tensor())
    if not values.numel():
        refuse_empty(name)
    return cast(Tensor, values)


def columns_of(weight: Any, indices: Tensor, column_set: ColumnSet) -> Tensor:
    """Return columns of a weight; one that is spread is whole for this moment."""
    return read_columns(whole(weight, column_set.name), indices, dim=column_set.dim)


def refuse_empty(name: str) -> NoReturn:
    """Refuse a tensor whose values only DeepSpeed can bring here."""
    raise ValueError(
        f"{name!r} is empty here, its values are spread over the processes; call this inside "
        "deepspeed.zero.GatheredParameters(list(model.parameters()))."
    )
