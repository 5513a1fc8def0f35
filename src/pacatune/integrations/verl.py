"""verl's trainers: a checkpoint engine that brings a PaCA actor's columns to its rollouts.

Its name is `pacatune` where `custom_backend_module` names this module; docs/rl.md has settings.
The first sync brings the adapted weights as they were pretrained. Each rollout worker keeps them,
writes columns into them, and hands whole tensors to its server, within the machine.
"""

import functools
import json
import sys
from collections.abc import AsyncIterator
from typing import Any

import torch
from torch import Tensor
from verl.checkpoint_engine.base import CheckpointEngine, CheckpointEngineRegistry

from pacatune.format.tensors import plain_name
from pacatune.integrations.broadcast import BACKEND, Broadcast
from pacatune.precision import torch_dtype
from pacatune.sync import ColumnReceiver, ColumnSource
from pacatune.sync.adapted import base_of
from pacatune.sync.message import Reader, to_wire
from pacatune.tuner.layer import PacaLayer


@CheckpointEngineRegistry.register(BACKEND)
class ColumnCheckpointEngine(CheckpointEngine):
    """Sends columns from the actor's first rank, `is_master`, to every rollout worker, by gloo.

    verl's `engine_kwargs` may give the `dtype` of the served weights and a `timeout` in seconds.
    """

    def __init__(
        self,
        bucket_size: int,
        is_master: bool = False,
        dtype: str = "bfloat16",
        timeout: float = 600,
    ) -> None:
        self.is_master, self.timeout = is_master, timeout
        self.dtype = torch_dtype(dtype, option="dtype")
        self._group: Broadcast | None = None
        self._source: ColumnSource | None = None
        self._receiver: ColumnReceiver | None = None
        self._reader = Reader()
        self._served: dict[str, Tensor] = {}
        _hand_over_the_model()

    def prepare(self) -> dict[str, Any]:
        """Return where the first rank listens, and whether this worker has weights by now."""
        if not self.is_master:
            return {"has_weights": self._receiver is not None}
        from ray.util import get_node_ip_address
        from verl.utils.net_utils import get_free_port

        host = get_node_ip_address().strip("[]")
        return {"host": host, "port": get_free_port(host)[0]}

    @classmethod
    def build_topology(
        cls, actor_wg_world_size: int, rollout_world_size: int, metadata: list[dict[str, Any]]
    ) -> tuple[dict[str, list[Any]], dict[str, list[Any]]]:
        """Return the arguments of `init_process_group` for the workers of both groups."""
        is_whole = not all(worker["has_weights"] for worker in metadata[actor_wg_world_size:])
        same = {**metadata[0], "size": 1 + rollout_world_size, "is_whole": is_whole}
        ranks = [0] + [-1] * (actor_wg_world_size - 1), [*range(1, 1 + rollout_world_size)]
        a, b = ({"rank": r, **{k: [v] * len(r) for k, v in same.items()}} for r in ranks)
        return a, b

    def init_process_group(
        self, rank: int, host: str, port: int, size: int, is_whole: bool
    ) -> None:
        """Join; the actor's other ranks only take part in gathering columns."""
        self._is_whole = is_whole
        if rank >= 0:
            self._group = Broadcast(host, port, rank, size, torch.device("cpu"), self.timeout)

    def finalize(self) -> None:
        """Leave: workers may come and go between two syncs."""
        self._group = None

    async def send_weights(self, weights: Any, global_steps: int | None = None) -> dict[str, Any]:
        """Send the columns that were changed; return how many bytes this rank has sent for them."""
        if not isinstance(weights, torch.nn.Module):
            raise ValueError(
                "the actor is no PaCA model of verl's FSDP engine; give a PaCA adapter as "
                "`model.lora_adapter_path`, or another `checkpoint_engine.backend`."
            )
        if self._source is None:
            self._source = ColumnSource(weights, self.dtype)
        if self._is_whole:
            self._source.forget()
            names = {
                column_set.parameter: column_set.name
                for column_set in self._source.positions().sets
            }
            for name, tensor in base_of(weights).state_dict().items():
                if (served_as := names.get(plain_name(name))) is not None:
                    whole = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
                    self._send({"name": served_as, "shape": whole.shape}, whole.to(self.dtype))
        columns = self._source.columns()
        if self._group is None:  # another rank sends
            return {"sync/num_bytes": 0}
        words, buffer = to_wire(columns)
        self._send({"message": words}, buffer)
        self._send({"is_last": True}, torch.empty(0, device="cpu"))
        return {"sync/num_bytes": buffer.nbytes}

    def _send(self, words: dict[str, Any], tensor: Tensor) -> None:
        if self._group is not None:
            encoded = torch.frombuffer(bytearray(json.dumps(words).encode()), dtype=torch.uint8)
            buffer = tensor.detach().contiguous().view(-1).view(torch.uint8).cpu()
            self._group.broadcast(torch.tensor([len(encoded), len(buffer)], device="cpu"))
            self._group.broadcast(torch.cat([encoded, buffer]))

    def _receive(self) -> tuple[dict[str, Any], Tensor]:
        assert self._group is not None, "verl calls init_process_group first"
        sizes = self._group.broadcast(torch.empty(2, dtype=torch.int64, device="cpu")).tolist()
        message = self._group.broadcast(torch.empty(sum(sizes), dtype=torch.uint8, device="cpu"))
        return json.loads(message[: sizes[0]].numpy().tobytes()), message[sizes[0] :].clone()

    async def receive_weights(self, global_steps: int | None = None) -> AsyncIterator[Any]:
        """Yield the adapted weights with the columns of this sync."""
        receiver, self._receiver = self._receiver, None  # an error has the next sync be complete
        while "is_last" not in (received := self._receive())[0]:
            words, buffer = received
            if "name" in words:
                self._served[words["name"]] = buffer.view(self.dtype).view(words["shape"])
                receiver = None
                continue
            receiver = receiver or ColumnReceiver(self._served)
            receiver.apply(self._reader.read(words["message"], buffer))
        self._receiver = receiver
        for name, tensor in self._served.items():
            yield name, tensor


def _hand_over_the_model() -> None:
    """Have verl's FSDP engine, if this process has one, give a PaCA model instead of tensors."""
    module = sys.modules.get("verl.workers.engine.fsdp.transformer_impl")
    engine: Any = getattr(module, "FSDPEngine", None)
    if engine is None or hasattr(engine.get_per_tensor_param, "__wrapped__"):
        return
    plain = engine.get_per_tensor_param

    @functools.wraps(plain)
    def get_per_tensor_param(self: Any, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        is_ours = any(isinstance(module, PacaLayer) for module in self.module.modules())
        return (self.module, None) if is_ours else plain(self, *args, **kwargs)

    engine.get_per_tensor_param = get_per_tensor_param
