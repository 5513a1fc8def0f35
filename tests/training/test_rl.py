"""GRPO and RLOO on tiny models."""

import sys
from pathlib import Path

import pytest
import torch

from pacatune.training import train
from pacatune.training.config import reward_name
from pacatune.training.config_file import read_values
from pacatune.training.output import last_checkpoint, read_state
from pacatune.tuner.layer import PacaLayer
from tests.adapters.fixtures import model_copy
from tests.training.runs import (
    QUIET,
    assert_same,
    assert_same_run,
    make_trainer,
    refused,
    write_rows,
)

__all__ = ["model_copy"]
pytestmark = pytest.mark.usefixtures("rewards_module")


@pytest.mark.parametrize(("task", "method"), [("grpo", "paca"), ("rloo", "lora")])
def test_run(make_task_config, tmp_path, task, method):
    config = make_task_config(task, method, reward=["my_rewards:short", "my_rewards:even"])
    report = train(config, console=QUIET)
    rewards = {f"rewards/my_rewards.{name}/mean" for name in ("short", "even")}
    assert report.eval_metrics_after.keys() >= {"reward", *rewards}
    folder = tmp_path / "out"
    assert (folder / "reward.png").exists() > (folder / "loss.png").exists()
    assert not any("loss" in row for row, _ in report.table())  # it says nothing of rewards


@pytest.mark.parametrize("task", ["grpo", "rloo"])
def test_a_row_sets_variables_of_the_template(make_task_config, model_copy, tmp_path, task):
    """TRL takes those of the run alone."""
    template = "{{ mode }}{% for m in messages %}{{ m.content }}{% endfor %}"
    (model_copy / "chat_template.jinja").write_text(template)
    row = {"prompt": [{"role": "user", "content": "q"}]}
    rows = [{**row, "chat_template_kwargs": {"mode": "slow"}}, row] * 5
    path = str(write_rows(tmp_path / "rows.jsonl", rows))
    (tmp_path / "my_rewards.py").write_text(
        "def see(chat_template_kwargs, completions, **kwargs):\n"
        "    return [0.0] * len(completions)\n"
    )
    data = {"path": path, "chat_template_kwargs": {"mode": "fast"}, "eval_fraction": 0}
    options = {"model": {"path": str(model_copy)}, "training": {"eval_strategy": "no"}}
    trainer = make_trainer(make_task_config(task, data=data, reward=["my_rewards:see"], **options))
    rows = [trainer.train_dataset[place] for place in (0, 0, 1, 1)]
    ids = trainer._generate_and_score_completions(rows)["prompt_ids"]
    texts = trainer.processing_class.batch_decode(ids, skip_special_tokens=True)
    assert texts == ["slowq" if row["chat_template_kwargs"] else "fastq" for row in rows]
    assert {*texts} == {"fastq", "slowq"}


def constant(completions, **kwargs):
    return [1.0] * len(completions)


def test_functions_as_rewards(make_task_config, tmp_path):
    """As TRL takes them: one, or a list; a text is one as well, by its name."""
    training = {"max_steps": 1, "eval_strategy": "no"}
    names = set()
    for reward in (
        constant,
        [constant, lambda completions, **kwargs: [0.0] * 4],
        "my_rewards:even",
    ):
        config = make_task_config("grpo", reward=reward, training=training)
        names |= train(config, overwrite=True, console=QUIET).train_metrics.keys()
    module = constant.__module__
    own = "test_functions_as_rewards.<locals>.<lambda>"
    found = (f"{module}.constant", f"{module}.{own}", "my_rewards.even")
    assert names >= {f"rewards/{name}/mean" for name in found}
    assert read_values(tmp_path / "out/config.yaml")["reward"] == ["my_rewards:even"]
    assert reward_name(constant) == f"{module}:constant"


def test_answers_are_sampled_from_resident_weights(make_task_config):
    """R7: they are trained as they were sampled; the reference, asked in between, is the base."""
    training = {"beta": 0.1, "max_steps": 3, "eval_strategy": "no", "bf16": True}
    config = make_task_config("grpo", model={"dtype": "bfloat16"}, training=training)
    trainer = make_trainer(config)
    assert trainer.ref_model is None
    layer = next(m for m in trainer.model.modules() if isinstance(m, PacaLayer))
    base = layer.weight.detach().clone()
    seen = []

    def look(module, args, output):
        if not torch.is_grad_enabled() and args[0].shape[1] == 1:  # a step of generation
            assert torch.is_autocast_enabled("cpu")
            seen.append(layer.residency.kept is not None)

    handle = layer.register_forward_hook(look)
    trainer.train()
    handle.remove()
    # the first answers are the base's own, since nothing is trained yet
    assert len(seen) >= 14
    assert all(seen[len(seen) // 2 :])
    assert torch.equal(layer.weight, base)


@pytest.fixture
def reward_that(tmp_path, rewards_module):
    """Let the reward do something at some of its calls, or work as before."""
    path = tmp_path / f"{rewards_module}.py"
    good = path.read_text()

    def write(action=None, after=0):
        first, rest = good.split("\n", 1)
        counted = f"calls = []\n\n\n{first}\n    calls.append(1)\n    if len(calls) > {after}:\n"
        path.write_text(good if action is None else f"{counted}        {action}\n{rest}")
        sys.modules.pop(rewards_module, None)

    return write


@pytest.mark.parametrize(
    ("task", "training", "good_calls", "kept"),
    [
        ("grpo", {"save_steps": 2}, 3, 2),
        # Answers serve four steps; the second ones are never scored.
        ("rloo", {"save_steps": 1, "num_iterations": 4}, 1, 4),
    ],
)
def test_a_reward_that_fails(
    make_task_config, tmp_path, reward_that, task, training, good_calls, kept
):
    """Mended and resumed, the run is one that never failed."""

    def config(name):
        more = {"output_dir": str(tmp_path / name), "max_steps": 5, **training}
        return make_task_config(task, data={"eval_fraction": 0}, training=more)

    train(config("whole"), console=QUIET)
    reward_that("raise OSError('no judge')", after=good_calls)
    message = (
        r"reward 'my_rewards:short' raised OSError \(no judge\) on \d answers \(.*, row \d+ is the "
        rf"first\)\. Mend the function, then continue from .*checkpoint-{kept} with --resume"
    )
    refused(message, config("cut"))
    reward_that()
    train(config("cut"), console=QUIET, resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "cut")


def test_rewards_that_are_no_numbers(make_task_config, reward_that):
    reward_that("return [float('nan')] * len(completions)")
    message = r"returned \[nan, .*prompts.jsonl, row \d+.* Mend the function, then start again"
    refused(message, make_task_config("grpo", data={"eval_fraction": 0}))
    reward_that("return [None] * len(completions)")  # which says nothing
    config = make_task_config("grpo", training={"max_steps": 2})
    report = train(config, console=QUIET, overwrite=True)
    assert "reward" not in report.train_metrics
    assert ("held-out reward after", "-") in report.table()


def test_on_a_quantised_base(make_task_config):
    pytest.importorskip("bitsandbytes")
    training = {"max_steps": 2, "eval_strategy": "no", "beta": 0.1}
    assert train(make_task_config("grpo", "qpaca", training=training), console=QUIET).num_steps == 2


@pytest.mark.parametrize(("num_iterations", "steps"), [(1, [0, 2, 4, 5]), (4, [0, 4, 5])])
def test_the_best_checkpoint_is_that_of_the_highest_reward(
    make_task_config, tmp_path, num_iterations, steps
):
    """An evaluation that chooses it waits with the checkpoint until no answers are left."""
    training = {"eval_steps": 2, "save_steps": 2, "max_steps": 5, "num_iterations": num_iterations}
    config = make_task_config("grpo", training=training, early_stopping_patience=9)
    report = train(config, console=QUIET)
    rewards = dict(report.eval_metrics["reward"])
    assert sorted(rewards) == steps
    best = Path(read_state(last_checkpoint(tmp_path / "out"))["best_model_checkpoint"])
    assert best.name == f"checkpoint-{max(steps[1:], key=rewards.get)}"
    assert_same(best, tmp_path / "out")


def test_answers_that_are_logged_are_those_of_this_run(make_task_config, tmp_path):
    training = {"log_completions": True, "max_steps": 2}
    folder = tmp_path / "out" / "completions"
    train(make_task_config("grpo", training=training), console=QUIET)
    (folder / "completions_00009.parquet").touch()  # of a longer run
    train(make_task_config("grpo", training=training), console=QUIET, overwrite=True)
    names = {f"completions_0000{step}.parquet" for step in (0, 1, 2)}
    assert {path.name for path in folder.iterdir()} == names
