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
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from trl.generation import vllm_client, vllm_generation

from pacatune.integrations.broadcast import BACKEND
from pacatune.integrations.vllm import VllmTransport
from pacatune.sync.source import ColumnSource
from pacatune.tuner.layer import PacaLayer

logger = logging.getLogger(__name__)


@contextmanager
def column_sync() -> Iterator[None]:
    """Have the trainers of TRL that are made in this block send columns to vLLM."""
    from trl.trainer import grpo_trainer, rloo_trainer

    plain = vllm_generation.VLLMGeneration
    loaded = [module for name, module in list(sys.modules.items()) if name.startswith("trl.")]
    users = [one for one in loaded if vars(one).get("VLLMGeneration") is plain]
    assert grpo_trainer in users, "TRL makes it by this name"
    assert rloo_trainer in users, "TRL makes it by this name"
    for module in users:
        vars(module)["VLLMGeneration"] = ColumnGeneration
    try:
        yield
    finally:
        for module in users:
            vars(module)["VLLMGeneration"] = plain


class ColumnClient(vllm_client.VLLMClient):
    """TRL's client of a vLLM server that runs with our engine."""

    columns: VllmTransport

    def init_communicator(self, device: Any = 0) -> None:
        """Prepare the server's engine; columns come with the requests, from any device."""
        config = self.get_server_info()["weight_transfer_config"]
        if config is None or config["backend"] != BACKEND:
            raise RuntimeError(
                f"the vLLM server at {self.base_url} runs with weight_transfer_config={config}; "
                f"""restart it with `--weight-transfer-config '{{"backend": "{BACKEND}"}}'`."""
            )
        self.columns = VllmTransport(self.base_url)


class ColumnGeneration(vllm_generation.VLLMGeneration):
    """TRL's vLLM of a trainer, which gets a PaCA model's columns."""

    _source: ColumnSource | None = None
    _transport: VllmTransport | None = None
    _sends_columns = False

    def _init_vllm(self) -> None:
        reason = self._why_not()
        if reason is not None:
            if any(isinstance(module, PacaLayer) for module in self.model.modules()):
                logger.warning("vLLM gets every parameter at each sync, not columns: %s", reason)
            super()._init_vllm()
            return
        with _with_our_engine():
            super()._init_vllm()
        self._sends_columns = True
        if self.mode == "colocate":
            self._transport = VllmTransport(self.llm)
        elif self.accelerator.is_main_process:
            self._transport = self.vllm_client.columns

    def _why_not(self) -> str | None:
        if self.mode == "colocate" and self.enable_sleep_mode:
            return "`vllm_enable_sleep_mode` discards the weights after each batch."
        try:
            ColumnSource(self.model)
        except ValueError as error:
            return str(error)
        return None

    def sync_weights(self) -> None:
        """Send the columns that were changed; a collective if the model is sharded."""
        if not self._sends_columns:
            super().sync_weights()
            return
        if self._source is None:
            # Not earlier: the trainer shards the model after it has made this object.
            self._source = ColumnSource(self.model, self._served_dtype())
            self._check_base(self._source)
        self._source.send(self._transport)

    def _check_base(self, source: ColumnSource) -> None:
        if self._transport is not None:
            self._transport.check_base(source)
            return
        source.positions()
        source.base_columns()
        source.forget()

    def _served_dtype(self) -> torch.dtype:
        if self.mode == "colocate":
            return self.llm.llm_engine.vllm_config.model_config.dtype
        found = [None]
        if self.accelerator.is_main_process:
            found = [self.vllm_client.get_server_info()["model_config"]["dtype"]]
        if self.accelerator.num_processes > 1:
            torch.distributed.broadcast_object_list(found, src=0)
        return getattr(torch, str(found[0]).removeprefix("torch."))


@contextmanager
def _with_our_engine() -> Iterator[None]:
    """Have TRL start vLLM with our engine, or talk to a server with it."""
    plain = {name: getattr(vllm_generation, name, None) for name in ("LLM", "VLLMClient")}
    transfer = {"backend": BACKEND}
    vars(vllm_generation)["VLLMClient"] = ColumnClient
    if plain["LLM"] is not None:  # else TRL says that vLLM is missing
        vars(vllm_generation)["LLM"] = partial(plain["LLM"], weight_transfer_config=transfer)
    try:
        yield
    finally:
        vars(vllm_generation).update({k: one for k, one in plain.items() if one is not None})
