import importlib.util

import pytest

from pacatune.training import RunConfig, train
from tests.data.conftest import talk
from tests.training.runs import QUIET, assert_same_run, interrupt, write_rows

# `make test-distributed` lets it be found.
collect_ignore = [] if importlib.util.find_spec("deepspeed") else ["test_deepspeed.py"]


@pytest.fixture(autouse=True)
def _blank_pictures(blank_pictures):
    """Those of a run are drawn in test_report.py, once each."""


def turn(role, content):
    return [{"role": role, "content": content}]


@pytest.fixture(scope="session")
def data_path(tmp_path_factory):
    rows = [talk(f"What is {i}?", f"It is {7 * i % 10}.") for i in range(60)]
    return write_rows(tmp_path_factory.mktemp("data") / "chats.jsonl", rows)


@pytest.fixture(scope="session")
def pairs_path(tmp_path_factory):
    rows = [
        {
            "prompt": turn("user", f"What is {i}?"),
            "chosen": turn("assistant", f"It is {7 * i % 10}."),
            "rejected": turn("assistant", "No idea."),
        }
        for i in range(40)
    ]
    return write_rows(tmp_path_factory.mktemp("data") / "pairs.jsonl", rows)


@pytest.fixture(scope="session")
def prompts_path(tmp_path_factory):
    rows = [{"prompt": f"Count {i}", "number": i} for i in range(40)]
    return write_rows(tmp_path_factory.mktemp("data") / "prompts.jsonl", rows)


@pytest.fixture
def make_config(tiny_model_dir, data_path, tmp_path):
    """Build a run of 8 steps, a checkpoint every second; options override what it says."""
    usual = {
        "output_dir": str(tmp_path / "out"),
        "report_to": "none",
        "learning_rate": 5e-3,
        "bf16": False,
        "save_steps": 2,
        "eval_steps": 4,
        "use_cpu": True,
    }

    def make(method="paca", *, model=None, data=None, training=None, **options):
        return RunConfig(
            method=method,
            model={"path": str(tiny_model_dir), **(model or {})},
            data={"path": str(data_path), **(data or {})},
            training={**usual, **(training or {})},
            **options,
        )

    return make


@pytest.fixture
def make_task_config(make_config, pairs_path, prompts_path):
    """Build a run of any task of `train`, six steps long, with a checkpoint every second."""
    usual = {"warmup_steps": 0, "max_steps": 6, "eval_steps": 6, "logging_steps": 1}

    def make(task, method="paca", *, data=None, training=None, **options):
        given, sampling, path = training or {}, {"per_device_train_batch_size": 8}, pairs_path
        if task in ("grpo", "rloo"):
            sampling = {"per_device_train_batch_size": 4, "num_generations": 2}
            sampling["max_completion_length"] = 8
            path = prompts_path
            options.setdefault("reward", ["my_rewards:short"])
        held_out = 0.2 * (given.get("eval_strategy") != "no")
        return make_config(
            method,
            task=task,
            data={"path": str(path), "eval_fraction": held_out, **(data or {})},
            training={**usual, **sampling, **given},
            **options,
        )

    return make


@pytest.fixture
def assert_resumes(tmp_path, monkeypatch):
    """Interrupted in a step and resumed, a run ends with the very bits of one that was not.

    `make` makes it. Returns what the interrupted one said.
    """

    def check(step, make, *words, training=None, **options):
        def config(name):
            here = {"output_dir": str(tmp_path / name)}
            return make(*words, training={**(training or {}), **here}, **options)

        train(config("whole"), console=QUIET)
        said = interrupt(config("cut"), monkeypatch, step)
        train(config("cut"), console=QUIET, resume=True)
        assert_same_run(tmp_path / "whole", tmp_path / "cut")
        return said

    return check
