"""Two ranks of a real vLLM, each with its part of every weight."""

from pacatune.integrations.vllm import VllmTransport
from pacatune.sync import ColumnSource
from tests.vllm.conftest import (
    Trainer,
    adapted,
    answers,
    digests_by_rank,
    save_small_model,
    start,
    stop,
    trained_digests,
)


def expected(model):
    return [trained_digests(model, rank, 2) for rank in range(2)]


def test_each_rank_has_its_part(model_path, tmp_path, monkeypatch, free_port):
    folder = str(tmp_path)
    save_small_model(model_path, folder)
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    llm = start(folder, tensor_parallel_size=2)
    try:
        base = digests_by_rank(llm)
        before = answers(llm)
        trainer = Trainer(adapted(folder))
        source = ColumnSource(trainer.model)
        transport = VllmTransport(llm)
        transport.check_base(source)
        for _ in range(2):
            trainer.step()
            source.send(transport)
            assert digests_by_rank(llm) == expected(trainer.model)
        assert answers(llm) != before
        transport = VllmTransport(llm, broadcast=("127.0.0.1", free_port), timeout=60)
        trainer.step()
        source.forget()
        source.send(transport)
        assert digests_by_rank(llm) == expected(trainer.model)
        transport.revert()
        assert digests_by_rank(llm) == base
        assert answers(llm) == before
    finally:
        stop(llm)
