"""TRL's trainers with vLLM: a PaCA model's sync sends its columns, and nothing is merged.

TRL merges an adapter, sends every parameter and unmerges, before each batch of answers. With

    with column_sync():
        trainer = GRPOTrainer(..., args=GRPOConfig(use_vllm=True), peft_config=PacaConfig(...))

the columns of W' are sent, to vLLM in this process (`vllm_mode="colocate"`) or to a server. Other
models are synced as TRL does it.
"""

import logging
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from trl.generation import vllm_client, vllm_generation

from pacatune.integrations.broadcast import BACKEND
from pacatune.integrations.vllm import VllmTransport
from pacatune.sync.source import ColumnSource
from pacatune.tuner.layer import PacaLayer

logger = logging.getLogger(__name__)


@contextmanager
def column_sync() -> Iterator[None]:
    """Have the trainers of TRL that are made in this block send columns to vLLM.

    GRPO, RLOO and whatever else samples by TRL's `VLLMGeneration`.
    """
    from trl.trainer import grpo_trainer, rloo_trainer

    plain = vllm_generation.VLLMGeneration
    loaded = [module for name, module in list(sys.modules.items()) if name.startswith("trl.")]
    users = [module for module in loaded if vars(module).get("VLLMGeneration") is plain]
    assert grpo_trainer in users, "TRL makes it by this name"
    assert rloo_trainer in users, "TRL makes it by this name"
    with ExitStack() as stack:
        for module in users:
            stack.enter_context(patch.object(module, "VLLMGeneration", ColumnGeneration))
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
        with _our_engine():
            super()._init_vllm()
        self._send = _Sender(self)

    def sync_weights(self) -> None:
        """Send the columns that were changed; a collective if the model is sharded."""
        (self._send or super().sync_weights)()


class _Sender:
    """Brings the columns of a trainer's model to the vLLM that it samples with.

    Args:
        owner: Has `model`, `accelerator`, `mode`, and `llm` or `vllm_client`.
    """

    def __init__(self, owner: Any) -> None:
        self._owner = owner
        self._source: ColumnSource | None = None
        self.transport: VllmTransport | None = None
        if owner.mode == "colocate":
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
        source.base_columns()

    def _served_dtype(self) -> torch.dtype:
        if self._owner.mode == "colocate":
            return self._owner.llm.llm_engine.vllm_config.model_config.dtype
        dtypes = [None]
        if self._owner.accelerator.is_main_process:
            dtypes = [self._owner.vllm_client.get_server_info()["model_config"]["dtype"]]
        if self._owner.accelerator.num_processes > 1:
            torch.distributed.broadcast_object_list(dtypes, src=0)
        return getattr(torch, str(dtypes[0]).removeprefix("torch."))


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
def _our_engine() -> Iterator[None]:
    """Have TRL start vLLM with our engine, or talk to a server with it."""
    ours: dict[str, Any] = {"VLLMClient": ColumnClient}
    if (llm := vars(vllm_generation).get("LLM")) is not None:  # if vLLM is there
        ours["LLM"] = partial(llm, weight_transfer_config={"backend": BACKEND})
    with patch.multiple(vllm_generation, **ours):
        yield
