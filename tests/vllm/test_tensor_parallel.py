"""Two ranks of a real vLLM, each with its part of every weight."""

import pytest
import torch

from pacatune.integrations.vllm import VllmTransport
from pacatune.sync import ColumnSource
from tests.vllm.conftest import (
    Trainer,
    adapted,
    answers,
    digest,
    save_small_model,
    start,
    stop,
    trained_state,
)


@pytest.fixture(scope="module")
def small_model(model_path, tmp_path_factory):
    folder = tmp_path_factory.mktemp("small")
    save_small_model(model_path, folder)
    return str(folder)


def test_each_rank_has_its_part(small_model, monkeypatch, free_port):
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    llm = start(small_model, tensor_parallel_size=2)
    try:
        base = digests_by_rank(llm)
        before = answers(llm)
        trainer = Trainer(adapted(small_model))
        source = ColumnSource(trainer.model)
        transport = VllmTransport(llm)
        transport.check_base(source)
        for _ in range(2):
            trainer.step()
            source.send(transport)
            assert digests_by_rank(llm) == expected_by_rank(trained_state(trainer.model))
        assert answers(llm) != before
        transport = VllmTransport(llm, broadcast=("127.0.0.1", free_port), timeout=60)
        trainer.step()
        source.forget()
        source.send(transport)
        assert digests_by_rank(llm) == expected_by_rank(trained_state(trainer.model))
        transport.revert()
        assert digests_by_rank(llm) == base
        assert answers(llm) == before
    finally:
        stop(llm)


def digests_by_rank(llm):
    ranks = llm.collective_rpc("compute_weight_checksums")
    return [{name.rpartition(":")[2]: one for name, one in found.items()} for found in ranks]


def expected_by_rank(state, size=2):
    return [
        {name: digest(part) for name, part in parts_of_rank(state, rank, size)}
        for rank in range(size)
    ]


def parts_of_rank(state, rank, size):
    for name, tensor in state.items():
        if ".q_proj" in name:
            rows = [state[name.replace("q_proj", f"{one}_proj")] for one in "qkv"]
            joined = torch.cat([one.chunk(size)[rank] for one in rows])
            yield name.replace("q_proj", "qkv_proj"), joined
        elif ".gate_proj" in name:
            rows = [tensor, state[name.replace("gate_proj", "up_proj")]]
            joined = torch.cat([one.chunk(size)[rank] for one in rows])
            yield name.replace("gate_proj", "gate_up_proj"), joined
        elif ".o_proj" in name or ".down_proj" in name:
            yield name, tensor.chunk(size, dim=1)[rank]
        elif "embed_tokens" in name:
            yield name, tensor.chunk(size)[rank]
        elif "norm" in name:
            yield name, tensor
