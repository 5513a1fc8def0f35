"""Columns from a trainer into a running vLLM, by its own interface for weight updates.

vLLM finds `register` by the entry point group `vllm.general_plugins`, and takes the engine by name:
`LLM(..., weight_transfer_config={"backend": "pacatune"})`. This module imports nothing of vLLM, so
a trainer that talks to a server needs none. docs/rl.md says how to use it.

    inline       the columns are part of the request
    File         a folder that both see
    broadcast    the request has sizes; a group of the trainer and all workers has the columns
"""

import base64
import json
import urllib.error
import urllib.request
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pacatune.integrations.broadcast import BACKEND, Broadcast, weight_transfer
from pacatune.sync.message import Columns, to_wire
from pacatune.sync.transport import File


def register() -> None:
    """Make the engine known to vLLM; called by it in each of its processes."""
    from vllm.platforms import current_platform

    factory = weight_transfer().WeightTransferEngineFactory
    if BACKEND in factory._registry:  # plug-ins may be loaded twice
        return
    factory.register_engine(BACKEND, "pacatune.integrations.vllm_engine", "ColumnEngine")
    if current_platform.is_cpu():
        from pacatune.integrations.vllm_engine import keep_plain_weights

        keep_plain_weights()


class VllmTransport:
    """Brings a `ColumnSource`'s columns to a vLLM that was started with this engine.

    Its prefix cache is emptied after each sync, if the client can. Requests that run meanwhile go
    on with the new columns and the keys and values of the old ones: pause the server, or have none.

    Args:
        vllm: An `LLM`, the address of a server (`http://localhost:8000`, which must run with
            VLLM_SERVER_DEV_MODE=1), or a client of vLLM such as `RayVLLMWeightSyncClient`.
        folder: Send the columns as files in a folder that the workers see under the same path.
        broadcast: (address, port) of this process: send the columns by a process group that this
            process makes together with all workers.
        num_workers: Number of vLLM's workers, for `broadcast`; None: vLLM is asked.
        device: Where columns are broadcast from: a GPU for NCCL; None: the CPU, by gloo.
        timeout: Seconds that a request or a broadcast may take.

    Raises:
        ConnectionError: If the server does not answer, or runs without this engine.
    """

    def __init__(
        self,
        vllm: Any,
        *,
        folder: str | None = None,
        broadcast: tuple[str, int] | None = None,
        num_workers: int | None = None,
        device: torch.device | str | None = None,
        timeout: float = 300.0,
    ) -> None:
        if folder is not None and broadcast is not None:
            raise ValueError("`folder` and `broadcast` exclude each other; give one of them.")
        self.client, self.timeout = _client_of(vllm, timeout), timeout
        self._files = None if folder is None else File(folder)
        self._group: Broadcast | None = None
        self._is_broken = self._has_begun = False
        if broadcast is None:
            info = {} if folder is None else {"folder": str(Path(folder).absolute())}
            self.client.init_weight_transfer_engine(info)
            return
        if num_workers is None:
            num_workers = self.client.num_workers()
        self._join(broadcast, 1 + num_workers, torch.device(device or "cpu"))

    def _join(self, address: tuple[str, int], size: int, device: torch.device) -> None:
        host, port = address
        info = {"host": host, "port": port, "size": size, "timeout": self.timeout}
        info["device"] = device.type
        # The workers wait for this process, and this process for them.
        request = _in_background(self.client.init_weight_transfer_engine, info)
        self._group = Broadcast(host, port, 0, size, device, self.timeout)
        request.result()

    def send(self, columns: Columns, timeout: float | None = None) -> None:
        """Send one sync; see `pacatune.sync.Transport`."""
        self._update(columns, "columns")

    def check_base(self, source: Any) -> None:
        """Compare the base that is served with the trainer's, in the trained columns.

        Args:
            source: The `ColumnSource`.

        Raises:
            RuntimeError: If a column differs.
        """
        self._update(source.base_columns(), "base")

    def revert(self) -> None:
        """Have the server take all columns back: its weights are the base's, bit for bit.

        The source does not notice: call its `forget` before the next `send`.
        """
        self._request({"kind": "revert"}, "base")

    def receive(self, timeout: float | None = None) -> Columns:
        """Refuse: this end sends."""
        raise ValueError("this end sends; vLLM's workers receive.")

    def close(self) -> None:
        """Leave the group, if there is one; the server goes on with what it has."""
        self._is_broken = self._group is not None
        self._group = None

    def _update(self, columns: Columns, kind: str) -> None:
        if self._is_broken:
            raise ConnectionError("this transport was closed, or a broadcast failed; make another.")
        version = f"{columns.positions.run}-{columns.number}" if kind == "columns" else None
        if self._files is not None and kind != "base":
            self._files.send(columns)
            self._request({"kind": kind, "is_filed": True}, version)
            return
        is_far = isinstance(self.client, _Server) and self._group is None
        words, buffer = to_wire(columns, compress=is_far)
        if self._group is not None:
            update = {"kind": kind, "words": words, "num_bytes": buffer.nbytes}
            self._broadcast(self._group, buffer, _in_background(self._request, update, version))
        else:
            packed = getattr(self.client, "packed", _base64)
            self._request({"kind": kind, "words": words, "buffer": packed(buffer)}, version)

    def _broadcast(self, group: "Broadcast", buffer: Tensor, request: "Future[None]") -> None:
        try:
            group.broadcast(buffer)
        except RuntimeError as error:
            self._is_broken = True
            if request.done():
                request.result()  # what the workers said is worth more
            raise ConnectionError(
                f"the workers did not take the columns ({error}). Make another transport; the next "
                "`source.send` sends everything."
            ) from error
        request.result()

    def _request(self, update: dict[str, Any], version: str | None = None) -> None:
        try:
            self.client.start_weight_update()
        except Exception as error:
            if self._has_begun or "already active" not in str(error):
                raise
            # A trainer was killed within a sync, of which everything or nothing is written.
            self.client.finish_weight_update(None)
            self.client.start_weight_update()
        self._has_begun = True
        self.client.update_weights(update)
        self.client.finish_weight_update(version)
        if update["kind"] in ("columns", "revert"):
            getattr(self.client, "reset_prefix_cache", lambda: None)()


def _in_background(function: Any, *args: Any) -> "Future[None]":
    executor = ThreadPoolExecutor(max_workers=1)
    try:
        return executor.submit(function, *args)
    finally:
        executor.shutdown(wait=False)


def _base64(buffer: Tensor) -> str:
    return base64.b64encode(buffer.cpu().numpy().data).decode()


def _client_of(vllm: Any, timeout: float) -> Any:
    if isinstance(vllm, str):
        return _Server(vllm, timeout)
    return _Offline(vllm) if hasattr(vllm, "llm_engine") else vllm


class _Offline:
    """An `LLM` of this process; its workers may be in others."""

    def __init__(self, llm: Any) -> None:
        config = llm.llm_engine.vllm_config.weight_transfer_config
        if config is None or config.backend != BACKEND:
            raise ConnectionError(
                f"the LLM was made with weight_transfer_config={config}; give "
                f'`weight_transfer_config={{"backend": "{BACKEND}"}}`.'
            )
        self.llm = llm

    def num_workers(self) -> int:
        return int(self.llm.llm_engine.vllm_config.parallel_config.world_size_across_dp)

    def packed(self, buffer: Tensor) -> Any:
        # In this process nothing is encoded; to another one bytes may go, but no tensors.
        is_here = getattr(self.llm.llm_engine, "model_executor", None) is not None
        return buffer if is_here else buffer.cpu().numpy().tobytes()

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        self.llm.init_weight_transfer_engine({"init_info": init_info})

    def start_weight_update(self) -> None:
        self.llm.start_weight_update()

    def update_weights(self, update_info: dict[str, Any]) -> None:
        self.llm.update_weights({"update_info": update_info})

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self.llm.finish_weight_update(weight_version)

    def reset_prefix_cache(self) -> None:
        self.llm.reset_prefix_cache()


class _Server:
    """A `vllm serve` with its development endpoints."""

    def __init__(self, address: str, timeout: float) -> None:
        self.address, self.timeout = address.rstrip("/"), timeout

    def num_workers(self) -> int:
        return int(self._ask("get_world_size", None)["world_size"])

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        self._ask("init_weight_transfer_engine", {"init_info": init_info})

    def start_weight_update(self) -> None:
        self._ask("start_weight_update", {})

    def update_weights(self, update_info: dict[str, Any]) -> None:
        self._ask("update_weights", {"update_info": update_info})

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self._ask("finish_weight_update", {"weight_version": weight_version})

    def reset_prefix_cache(self) -> None:
        self._ask("reset_prefix_cache", {})

    def _ask(self, path: str, body: dict[str, Any] | None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(
            f"{self.address}/{path}", data=data, headers={"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=self.timeout) as response:
                text = response.read()
        except urllib.error.HTTPError as error:
            if error.code == 404:
                raise ConnectionError(
                    f"{self.address} has no /{path}; start vLLM with VLLM_SERVER_DEV_MODE=1 in its "
                    "environment."
                ) from error
            said = error.read().decode(errors="replace")[:2000]
            raise RuntimeError(
                f"{self.address}/{path} failed with {error.code}: {said}. The server must run with "
                f"""--weight-transfer-config '{{"backend": "{BACKEND}"}}'."""
            ) from error
        except urllib.error.URLError as error:
            raise ConnectionError(f"{self.address} does not answer ({error.reason}).") from error
        return json.loads(text) if text else None
