"""TRL's GRPO with a real vLLM, in the trainer's process and as a server."""

import pytest

from tests.vllm.conftest import PROMPTS, serve, served_digests, stop, trained_digests, weights_of


def reward(completions, **kwargs):
    return [float(len(set(text))) for text in completions]


def online(kind, config, path, folder, **more):
    from datasets import Dataset

    from pacatune import PacaConfig
    from pacatune.integrations.trl import column_sync

    options = {"output_dir": str(folder), "report_to": "none", "save_strategy": "no"}
    options |= {"max_steps": 2, "learning_rate": 5e-3, "per_device_train_batch_size": 4}
    options |= {"use_cpu": True, "bf16": False, "gradient_checkpointing": False, "logging_steps": 1}
    options |= {"num_generations": 4, "max_completion_length": 12, "use_vllm": True}
    args = config(**options, **more, model_init_kwargs={"dtype": "bfloat16"})
    rows = Dataset.from_dict({"prompt": PROMPTS * 4})
    paca = PacaConfig(r=16, paca_alpha=16, task_type="CAUSAL_LM")
    with column_sync():
        return kind(path, reward_funcs=reward, args=args, train_dataset=rows, peft_config=paca)


def sampling_gaps(trainer):
    """How far the sampler's log-probabilities are from the trainer's, by logged step."""
    name = "sampling/sampling_logp_difference/mean"
    return [row[name] for row in trainer.state.log_history if name in row]


@pytest.mark.parametrize("kind", ["GRPO", "RLOO"])
def test_colocate(kind, model_path, tmp_path, monkeypatch, eager):
    import trl

    from pacatune.integrations.trl import ColumnGeneration

    classes = getattr(trl, f"{kind}Trainer"), getattr(trl, f"{kind}Config")
    more = {"vllm_mode": "colocate", "vllm_max_model_length": 256}
    trainer = online(*classes, model_path, tmp_path, **more)
    generation = trainer.vllm_generation
    assert type(generation) is ColumnGeneration
    base = served_digests(generation.llm)
    monkeypatch.setattr(trainer.model, "merge_adapter", lambda: pytest.fail("nothing is merged"))
    sent = []
    plain = generation.sync_weights

    def counted():
        plain()
        sent.append(generation._send._source.number)

    generation.sync_weights = counted
    trainer.train()
    assert len(sent) == 2
    if kind == "GRPO":
        gaps = sampling_gaps(trainer)
        assert len(gaps) == 2
        assert max(gaps) < 0.1, gaps

    generation.sync_weights()
    served = served_digests(generation.llm)
    monkeypatch.undo()
    assert served == trained_digests(trainer.model)
    assert served != base
    stop(generation.llm)


@pytest.fixture
def server(model_path, tmp_path, free_port):
    with serve(model_path, free_port, tmp_path / "server.log"):
        yield f"http://127.0.0.1:{free_port}"


def test_server(model_path, tmp_path, server):
    from trl import GRPOConfig, GRPOTrainer

    more = {"vllm_mode": "server", "vllm_server_base_url": server}
    trainer = online(GRPOTrainer, GRPOConfig, model_path, tmp_path / "run", **more)
    before = weights_of(server)
    trainer.train()
    assert max(sampling_gaps(trainer)) < 0.1, sampling_gaps(trainer)
    trainer.vllm_generation.sync_weights()
    served = weights_of(server)
    assert served == trained_digests(trainer.model)
    assert served != before
    # A run that was killed has left its columns; another one begins.
    other = online(GRPOTrainer, GRPOConfig, model_path, tmp_path / "other", **more)
    other.vllm_generation.sync_weights()
    assert weights_of(server) == trained_digests(other.model) == before
