import importlib.util
import json
import sys

import pytest

from pacatune.training import DataConfig, ModelConfig, RunConfig, TrainingConfig

# `make test-distributed` lets it be found.
collect_ignore = [] if importlib.util.find_spec("deepspeed") else ["test_deepspeed.py"]


@pytest.fixture(autouse=True)
def _blank_pictures(blank_pictures):
    """Those of a run are drawn in test_report.py and image/test_recipe.py, once each."""


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


@pytest.fixture(scope="session")
def pairs_path(tmp_path_factory):
    """Forty questions with an answer that is preferred and one that is not."""
    path = tmp_path_factory.mktemp("data") / "pairs.jsonl"
    rows = [
        {
            "prompt": [{"role": "user", "content": f"What is {i}?"}],
            "chosen": [{"role": "assistant", "content": f"It is {7 * i % 10}."}],
            "rejected": [{"role": "assistant", "content": "No idea."}],
        }
        for i in range(40)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="session")
def prompts_path(tmp_path_factory):
    """Forty prompts with a number each."""
    path = tmp_path_factory.mktemp("data") / "prompts.jsonl"
    path.write_text(
        "".join(json.dumps({"prompt": f"Count {i}", "number": i}) + "\n" for i in range(40))
    )
    return path


@pytest.fixture
def rewards_module(tmp_path, monkeypatch):
    """The module `my_rewards` in the current folder, as a user writes one."""
    name = "my_rewards"
    (tmp_path / f"{name}.py").write_text(
        "def short(completions, **kwargs):\n"
        "    return [-len(text) / 10 for text in completions]\n\n\n"
        "def even(completions, number, **kwargs):\n"
        "    return [float(n % 2 == 0) for n in number]\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, name, raising=False)
    yield name
    sys.modules.pop(name, None)


@pytest.fixture
def make_task_config(tiny_model_dir, pairs_path, prompts_path, tmp_path):
    """Build a run of any task of `train`, six steps long, with a checkpoint every second."""

    def make(task, method="paca", *, model=None, data=None, training=None, **options):
        samples = task in ("grpo", "rloo")
        if samples:
            options.setdefault("reward", ["my_rewards:short"])
        least = (
            {"max_completion_length": 8, "num_generations": 2, "per_device_train_batch_size": 4}
            if samples
            else {"per_device_train_batch_size": 8}
        )
        path = prompts_path if samples else pairs_path
        evaluates = (training or {}).get("eval_strategy") != "no"
        return RunConfig(
            task=task,
            method=method,
            model={"path": str(tiny_model_dir), **(model or {})},
            data={"path": str(path), "eval_fraction": 0.2 * evaluates, **(data or {})},
            training={
                "output_dir": str(tmp_path / "out"),
                "report_to": "none",
                "learning_rate": 5e-3,
                "warmup_steps": 0,
                "bf16": False,
                "max_steps": 6,
                "save_steps": 2,
                "eval_steps": 6,
                "logging_steps": 1,
                "use_cpu": True,
                **least,
                **(training or {}),
            },
            **options,
        )

    return make
