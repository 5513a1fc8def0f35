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
    found = [one for one in parameters if hasattr(one, "ds_id")]
    if not found:
        return nullcontext()
    deepspeed = importlib.import_module("deepspeed")
    return cast("AbstractContextManager[Any]", deepspeed.zero.GatheredParameters(found))


def whole(parameter: Any, name: str) -> Tensor:
    """Return all values of a parameter that may be spread; ZeRO-3's must be `gathered`."""
    found = parameter.detach()
    if hasattr(found, "full_tensor"):
        return cast(Tensor, found.full_tensor())
    if not found.numel():
        refuse_empty(name)
    return cast(Tensor, found)


def columns_of(weight: Any, indices: Tensor, one: ColumnSet) -> Tensor:
    """Return columns of a weight; one that is spread is whole for this moment."""
    return read_columns(whole(weight, one.name), indices, dim=one.dim)


def refuse_empty(name: str) -> NoReturn:
    """Refuse a tensor whose values only DeepSpeed can bring here."""
    raise ValueError(
        f"{name!r} is empty here, its values are spread over the processes; call this inside "
        "deepspeed.zero.GatheredParameters(list(model.parameters()))."
    )
