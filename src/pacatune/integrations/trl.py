"""TRL's trainers with vLLM: a PaCA model's sync sends its columns, and nothing is merged.

TRL merges an adapter, sends every parameter and unmerges, before each batch of answers. With

    with column_sync():
        trainer = GRPOTrainer(..., args=GRPOConfig(use_vllm=True), peft_config=PacaConfig(...))

the columns of W' are sent, to vLLM in this process (`vllm_mode="colocate"`) or to a server. Other
models are synced as TRL does it.
"""

import functools
import inspect
import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial, partialmethod
from typing import Any
from unittest.mock import patch

import torch
from trl.generation import vllm_client, vllm_generation

from pacatune.integrations.broadcast import BACKEND
from pacatune.integrations.vllm import VllmTransport
from pacatune.sync.source import ColumnSource
from pacatune.tuner.config import PacaConfig
from pacatune.tuner.layer import PacaLayer

logger = logging.getLogger(__name__)


@contextmanager
def column_sync() -> Iterator[None]:
    """Have the trainers of TRL that are made in this block send columns to vLLM.

    GRPO, RLOO and whatever else samples by TRL's `VLLMGeneration`; OnlineDPO and AsyncGRPO if their
    classes were imported before the block.
    """
    from trl.trainer import grpo_trainer, rloo_trainer

    plain = vllm_generation.VLLMGeneration
    loaded = {name: one for name, one in list(sys.modules.items()) if name.startswith("trl.")}
    users = [one for one in loaded.values() if vars(one).get("VLLMGeneration") is plain]
    assert grpo_trainer in users, "TRL makes it by this name"
    assert rloo_trainer in users, "TRL makes it by this name"
    kinds = {
        vars(loaded[name])[cls]: init for (name, cls), init in _APART.items() if name in loaded
    }
    with ExitStack() as stack:
        for module in users:
            stack.enter_context(patch.object(module, "VLLMGeneration", ColumnGeneration))
        for kind, init in kinds.items():
            stack.enter_context(patch.object(kind, "__init__", partialmethod(init, kind.__init__)))
        yield


def _has_our_engine(address: str, config: Any) -> None:
    if config is None or config["backend"] != BACKEND:
        raise RuntimeError(
            f"the vLLM server at {address} runs with weight_transfer_config={config}; "
            f"""restart it with `--weight-transfer-config '{{"backend": "{BACKEND}"}}'`."""
        )


class ColumnClient(vllm_client.VLLMClient):
    """TRL's client of a vLLM server that runs with our engine."""

    columns: VllmTransport

    def init_communicator(self, device: Any = 0) -> None:
        """Prepare the server's engine; columns come with the requests, from any device."""
        _has_our_engine(self.base_url, self.get_server_info()["weight_transfer_config"])
        self.columns = VllmTransport(self.base_url)


class ColumnGeneration(vllm_generation.VLLMGeneration):
    """TRL's vLLM of a trainer, which gets a PaCA model's columns."""

    _send: "_Sender | None" = None

    def _init_vllm(self) -> None:
        sleeps = self.mode == "colocate" and self.enable_sleep_mode
        if not _sends_columns(self.model, sleeps):
            super()._init_vllm()
            return
        with _our_engine(vllm_generation, lambda: True):
            super()._init_vllm()
        self._send = _Sender(self, self.mode)

    def sync_weights(self) -> None:
        """Send the columns that were changed; a collective if the model is sharded."""
        (self._send or super().sync_weights)()


class _Sender:
    """Brings the columns of a trainer's model to the vLLM that it samples with.

    Args:
        owner: Has `model`, `accelerator`, and `llm` or `vllm_client`.
        mode: colocate or server.
    """

    def __init__(self, owner: Any, mode: str) -> None:
        self._owner, self._mode = owner, mode
        self._source: ColumnSource | None = None
        self.transport: VllmTransport | None = None
        if mode == "colocate":
            self.transport = VllmTransport(owner.llm)
        elif owner.accelerator.is_main_process:
            self.transport = getattr(owner.vllm_client, "columns", None)

    def __call__(self) -> None:
        if self._source is None:
            # Not earlier: the trainer shards the model after it has made this object.
            self._source = ColumnSource(self._owner.model, self._served_dtype())
            self._check_base(self._source)
        self._source.send(self.transport)

    def _check_base(self, source: ColumnSource) -> None:
        if self.transport is not None:
            self.transport.revert()  # what a run that was killed has left in a server
            self.transport.check_base(source)
            return
        source.positions()
        source.base_columns()
        source.forget()

    def _served_dtype(self) -> torch.dtype:
        if self._mode == "colocate":
            return self._owner.llm.llm_engine.vllm_config.model_config.dtype
        found = [None]
        if self._owner.accelerator.is_main_process:
            found = [self._owner.vllm_client.get_server_info()["model_config"]["dtype"]]
        if self._owner.accelerator.num_processes > 1:
            torch.distributed.broadcast_object_list(found, src=0)
        return getattr(torch, str(found[0]).removeprefix("torch."))


def _sends_columns(model: Any, sleeps: bool) -> bool:
    """Whether a model's columns can be sent; if it has some and they cannot, say why."""
    layers = [module for module in model.modules() if isinstance(module, PacaLayer)]
    reason = "`vllm_enable_sleep_mode` discards the weights after each batch." if sleeps else ""
    if any(layer.quantization_backend is not None for layer in layers):
        reason = "the base is quantised, and TRL has vLLM serve another one than it dequantises to."
    if not reason:
        try:
            ColumnSource(model)
        except ValueError as error:
            reason = str(error)
    if reason and layers:
        logger.warning("vLLM gets every parameter at each sync, not columns: %s", reason)
    return not reason


@contextmanager
def _our_engine(module: Any, is_ours: Callable[[], bool]) -> Iterator[None]:
    """Have a module of TRL start vLLM with our engine, or talk to a server with it."""
    plain = {name: vars(module)[name] for name in ("LLM", "VLLMClient") if name in vars(module)}

    def llm(*args: Any, **kwargs: Any) -> Any:
        if is_ours():
            kwargs["weight_transfer_config"] = {"backend": BACKEND}
        return plain["LLM"](*args, **kwargs)

    def client(*args: Any, **kwargs: Any) -> Any:
        return (ColumnClient if is_ours() else plain["VLLMClient"])(*args, **kwargs)

    ours: dict[str, Any] = {"LLM": llm, "VLLMClient": client}
    with patch.multiple(module, **{name: ours[name] for name in plain}):  # LLM: if vLLM is there
        yield


def _init_online_dpo(self: Any, init: Callable[..., None], *args: Any, **kwargs: Any) -> None:
    """Make a trainer that starts vLLM and moves weights by itself."""
    module = sys.modules[_ONLINE_DPO]
    is_ours = functools.cache(lambda: _sends_columns(self.model, self.args.vllm_enable_sleep_mode))
    with _our_engine(module, is_ours):
        init(self, *args, **kwargs)
    if self.use_vllm and is_ours():
        self._move_model_to_vllm = _Sender(self, self.vllm_mode)


class ColumnTransfer:
    """What TRL's AsyncGRPO asks of a way to send weights, for columns in requests to its server."""

    trainer: Any = None

    def init_weight_transfer(self) -> None:
        """Prepare the server's engine."""
        client = self.trainer.vllm_client
        client.wait_for_server_ready()
        _has_our_engine(client.server_url, client.get_server_info()["weight_transfer_config"])
        self.trainer._send.transport = VllmTransport(client.server_url)

    def destroy(self) -> None:
        """Leave the server as it is."""


def _init_async_grpo(self: Any, init: Callable[..., None], *args: Any, **kwargs: Any) -> None:
    """Make a trainer whose server answers while it trains."""
    given = inspect.signature(init).bind(self, *args, **kwargs).arguments
    if not isinstance(given.get("peft_config"), PacaConfig) or given.get("weight_transfer"):
        init(self, *args, **kwargs)
        return
    transfer = ColumnTransfer()
    init(self, *args, **kwargs, weight_transfer=transfer)
    ColumnSource(self.accelerator.unwrap_model(self.model))  # says what cannot be sent
    transfer.trainer, self._send = self, _Sender(self, "server")
    self._sync_weight_merged = partial(_sync_columns, self)


def _sync_columns(trainer: Any, start: float) -> tuple[float, float, float]:
    """Do what TRL's method of this place does, without a merge; return when its phases ended."""
    is_main = trainer.accelerator.is_main_process
    if is_main:
        trainer.vllm_client.pause()
    paused = time.time()
    trainer.accelerator.wait_for_everyone()
    ready = time.time()
    trainer._send()
    sent = time.time()
    trainer.accelerator.wait_for_everyone()
    if is_main:
        trainer.vllm_client.resume()
        trainer.model_version += 1
        if trainer.rollout_worker:
            trainer.rollout_worker.update_model_version(trainer.model_version)
    return paused, ready, sent


_ONLINE_DPO = "trl.experimental.online_dpo.online_dpo_trainer"
_ASYNC_GRPO = "trl.experimental.async_grpo.async_grpo_trainer"
_APART = {
    (_ONLINE_DPO, "OnlineDPOTrainer"): _init_online_dpo,
    (_ASYNC_GRPO, "AsyncGRPOTrainer"): _init_async_grpo,
}
"""Trainers with a way of their own to vLLM -> what makes one."""
