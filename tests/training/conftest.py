import json

import pytest

from pacatune.training import DataConfig, ModelConfig, RunConfig, TrainingConfig


@pytest.fixture(scope="session")
def data_path(tmp_path_factory):
    """Sixty small chats whose answers can be learned."""
    path = tmp_path_factory.mktemp("data") / "chats.jsonl"
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"What is {i}?"},
                {"role": "assistant", "content": f"It is {7 * i % 10}."},
            ]
        }
        for i in range(60)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def make_config(tiny_model_dir, data_path, tmp_path):
    """Build a run of 8 steps, a checkpoint every second; options override what it says."""

    def make(method="paca", *, model=None, data=None, training=None, **options):
        return RunConfig(
            method=method,
            model=ModelConfig(**{"path": str(tiny_model_dir), **(model or {})}),
            data=DataConfig(**{"path": str(data_path), **(data or {})}),
            training=TrainingConfig(
                **{
                    "output_dir": str(tmp_path / "out"),
                    "report_to": "none",
                    "learning_rate": 5e-3,
                    "bf16": False,
                    "save_steps": 2,
                    "eval_steps": 4,
                    "use_cpu": True,
                    **(training or {}),
                }
            ),
            **options,
        )

    return make
