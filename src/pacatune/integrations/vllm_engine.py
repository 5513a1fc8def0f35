"""The engine inside vLLM's workers: writes columns into the weights that are served, in place."""

import base64
import functools
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from vllm.config import get_current_vllm_config_or_none
from vllm.distributed import (
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size,
)
from vllm.platforms import current_platform

from pacatune.integrations.broadcast import BACKEND, Broadcast, weight_transfer
from pacatune.sync.message import Columns, Positions, Reader
from pacatune.sync.placement import FUSIONS
from pacatune.sync.receiver import ColumnReceiver
from pacatune.sync.transport import File

_base: Any = weight_transfer(".base")


@dataclass(kw_only=True)
class InitInfo(_base.WeightTransferInitInfo):
    """How columns come: in the requests, in files of `folder`, or from a group at `host`."""

    folder: str | None = None
    host: str | None = None
    port: int = 0
    size: int = 0
    device: str = "cpu"
    timeout: float = 300.0


@dataclass(kw_only=True)
class UpdateInfo(_base.WeightTransferUpdateInfo):
    """One message of a `VllmTransport`."""

    kind: str
    """columns, base or revert"""
    words: dict[str, Any] = field(default_factory=dict)
    buffer: Any = None
    """base64, bytes, or a tensor of this process"""
    is_filed: bool = False
    num_bytes: int = 0


class ColumnEngine(_base.WeightTransferEngine[InitInfo, UpdateInfo]):
    """Receives a `ColumnSource`'s columns. All of a sync is written or nothing of it."""

    init_info_cls = InitInfo
    update_info_cls = UpdateInfo
    supports_draft_weight_update = False

    def __init__(self, config: Any, vllm_config: Any, device: torch.device, model: Any) -> None:
        super().__init__(config, vllm_config, device, model)
        if vllm_config.lora_config is not None:
            raise ValueError(
                "`enable_lora` wraps the weights that columns are written into; serve without it."
            )
        rank, size = get_tensor_model_parallel_rank(), get_tensor_model_parallel_world_size()
        self.receiver = ColumnReceiver(
            model,
            tp_rank=rank,
            tp_size=size,
            fusions={**FUSIONS, **_fusions(model)},
            rename=_rename(model),
            is_partial=self.parallel_config.pipeline_parallel_size > 1,
        )
        self._reader = Reader()
        self._reachable: Positions | None = None  # those that `refuse_unreachable` let pass
        self._files: File | None = None
        self._group: Broadcast | None = None

    def init_transfer_engine(self, init_info: InitInfo) -> None:
        """Take the way that columns will come; one more time for another trainer."""
        self._files = File(init_info.folder) if init_info.folder else None
        self._group = None
        if init_info.host is not None:
            parallel = self.parallel_config
            rank = 1 + parallel.data_parallel_index * parallel.world_size + parallel.rank
            # The trainer chooses gloo or NCCL, and the buffers are where it wants them.
            is_own = self.device.type == init_info.device
            device = self.device if is_own else torch.device(init_info.device)
            self._group = Broadcast(
                init_info.host, init_info.port, rank, init_info.size, device, init_info.timeout
            )

    def start_weight_update(self) -> None:
        """Nothing to prepare: the weights stay where they are."""

    def finish_weight_update(self) -> None:
        """Nothing to finish: what is served is what was written."""

    def receive_weights(self, update_info: UpdateInfo) -> None:
        """Take one message."""
        if update_info.kind == "revert":
            self.receiver.revert()
            return
        columns = self._columns(update_info)
        if columns.positions is not self._reachable:
            refuse_unreachable(self.model, columns.positions, self.receiver.tp_size)
            self._reachable = columns.positions
        if update_info.kind == "base":
            self.receiver.check_base(columns)
        else:
            self.receiver.apply(columns)

    def _columns(self, info: UpdateInfo) -> Columns:
        if info.is_filed:
            assert self._files is not None, "init_transfer_engine was given the folder"
            return self._files.receive()
        if info.buffer is None and self._group is not None:
            device = self._group.device
            empty = torch.empty(info.num_bytes, dtype=torch.uint8, device=device)
            return self._reader.read(info.words, self._group.broadcast(empty))
        return self._reader.read(info.words, _unpacked(info.buffer))

    def shutdown(self) -> None:
        """Leave the group."""
        self._group = self._files = None


def refuse_unreachable(model: torch.nn.Module, positions: Positions, tp_size: int) -> None:
    """Refuse weights that vLLM uses in another way than the trainer, or keeps copies of."""
    rename = _rename(model) or (lambda name: name)
    joined = {name for name, parts in _packed(model).items() if list(parts) == [name]}
    tied = _tied(model)
    for place in positions.sets:
        name = rename(place.name)
        module = name.rpartition(".")[0].rpartition(".")[2]
        if module == "kv_b_proj":
            raise ValueError(
                f"{place.name!r}: vLLM's latent attention keeps products of this weight, which "
                "columns would not reach; leave it out of the targets."
            )
        if len(place.shape) > 2 and current_platform.is_cpu():
            raise ValueError(
                f"{place.name!r}: vLLM packs the weights of experts for CPUs, and columns cannot "
                "be written there; leave them out of the targets, or serve on a GPU."
            )
        if module in joined and tp_size > 1:
            raise ValueError(
                f"{place.name!r} is joined in the checkpoint, and tensor parallelism splits each "
                "of its parts, which is not supported; serve with tensor_parallel_size=1."
            )
        if name in tied:
            raise ValueError(
                f"{place.name!r}: vLLM has one tensor for {' and '.join(tied[name])}, since they "
                "were equal when it loaded them, and the trainer changes one of them; leave it out "
                "of the targets."
            )


def _tied(model: torch.nn.Module) -> dict[str, list[str]]:
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if parameter.numel():
            names.setdefault(parameter.data_ptr(), []).append(name)
    return {name: group for group in names.values() if len(group) > 1 for name in group}


def _packed(model: Any) -> Mapping[str, list[str]]:
    return getattr(model, "packed_modules_mapping", None) or {}


def _fusions(model: Any) -> dict[str, list[str]]:
    return {name: list(parts) for name, parts in _packed(model).items() if len(parts) > 1}


def _rename(model: Any) -> Any:
    """Return vLLM's own renaming of checkpoints, without its joining."""
    mapper = getattr(model, "hf_to_vllm_mapper", None)
    if mapper is None:
        return None
    plain = replace(mapper, orig_to_new_stacked={})
    return lambda name: plain.map_name(name) or name


def _unpacked(buffer: Any) -> Tensor:
    if isinstance(buffer, Tensor):
        return buffer
    data = base64.b64decode(buffer, validate=True) if isinstance(buffer, str) else buffer
    if not data:
        return torch.empty(0, dtype=torch.uint8, device="cpu")
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def keep_plain_weights() -> None:
    """Have vLLM on CPUs keep weights as they are, where this engine is to write into them.

    It packs them otherwise, and throws the plain ones away. The products are torch's own then.
    """
    from vllm.model_executor.layers import utils

    pack = utils.dispatch_cpu_unquantized_gemm

    @functools.wraps(pack)
    def dispatch(layer: Any, remove_weight: bool) -> None:
        config = get_current_vllm_config_or_none()
        transfer = None if config is None else config.weight_transfer_config
        if transfer is not None and transfer.backend == BACKEND:
            layer.cpu_linear = torch.nn.functional.linear
        else:
            pack(layer, remove_weight)

    utils.dispatch_cpu_unquantized_gemm = dispatch
