"""GRPO and RLOO on tiny models."""

import inspect
import json
import re
import signal
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from trl import DPOTrainer, GRPOTrainer, KTOTrainer, RewardTrainer, RLOOTrainer

from pacatune.training import PacaSection, TrainingInterrupted, preview, train
from pacatune.training import recipe as recipe_module
from pacatune.training.output import last_checkpoint, read_state
from pacatune.training.rewards import RewardError
from pacatune.training.rl import SamplingTrainer
from pacatune.training.task import task_of
from pacatune.training.trainer import RunTrainer
from pacatune.tuner.layer import PacaLayer
from tests.conftest import build_model

QUIET = Console(quiet=True)

pytestmark = pytest.mark.usefixtures("rewards_module")


def test_trl_still_has_what_is_overridden():
    names = re.findall(r"super\(\)\.(\w+)\(", inspect.getsource(SamplingTrainer))
    assert "_generate_single_turn" in names
    for trainer in (GRPOTrainer, RLOOTrainer):
        assert [name for name in names if not hasattr(trainer, name)] == []
    for trainer in (DPOTrainer, KTOTrainer, RewardTrainer):
        assert "_prepare_dataset" in vars(trainer)


def make_trainer(config):
    task = task_of(config)
    prepared = recipe_module.prepare(task, QUIET)
    return recipe_module.make_trainer(task, prepared, None, QUIET)


def assert_same(tmp_path, whole, cut):
    one, two = (load_file(tmp_path / n / "adapter_model.safetensors") for n in ("whole", "cut"))
    assert all(torch.equal(one[key], two[key]) for key in one)
    assert whole.train_losses == cut.train_losses
    assert whole.train_metrics == cut.train_metrics
    assert whole.eval_metrics == cut.eval_metrics


@pytest.mark.parametrize(("task", "method"), [("grpo", "paca"), ("rloo", "lora")])
def test_run(make_task_config, tmp_path, console, task, method):
    config = make_task_config(task, method, reward=["my_rewards:short", "my_rewards:even"])
    report = train(config, console=console)
    assert "evaluation reward -" in console.file.getvalue()
    assert report.tokens_per_second > 0
    assert set(report.eval_metrics_after) >= {
        "reward",
        "rewards/my_rewards.short/mean",
        "rewards/my_rewards.even/mean",
        "completions/mean_length",
    }
    # what is sampled is what is trained, the rounding of other kernels aside
    difference = report.train_metrics["sampling/sampling_logp_difference/max"]
    assert len(difference) == 6
    assert all(0 <= value < 1e-5 for _, value in difference)
    folder = tmp_path / "out"
    assert {path.name for path in folder.iterdir()} >= {"adapter_model.safetensors", "reward.png"}
    assert not (folder / "loss.png").exists()
    rows = dict(report.table())
    assert rows["held-out reward before"] != "-"
    assert not any("loss" in row for row in rows)  # it says nothing of rewards
    text = (folder / "config.yaml").read_text()
    words = "--reward my_rewards:short --reward my_rewards:even"
    assert text.startswith(f"# Repeat with: pacatune train --config config.yaml {words}\n")
    assert f"`pacatune train --config config.yaml {words}` repeats" in (
        (folder / "README.md").read_text()
    )


def test_a_reward_is_learned(make_task_config, tiny_tokenizer, tmp_path):
    """Answers get more tokens of the first half of the vocabulary."""
    (tmp_path / "my_rewards.py").write_text(
        "def early(completion_ids, **kwargs):\n"
        "    return [sum(i < 150 for i in ids) / len(ids) for ids in completion_ids]\n"
    )
    # Larger weights than a new model's, which say nothing about any token.
    build_model(len(tiny_tokenizer), initializer_range=0.3).save_pretrained(tmp_path / "model")
    tiny_tokenizer.save_pretrained(tmp_path / "model")
    training = {
        "max_steps": 20,
        "num_generations": 16,
        "per_device_train_batch_size": 16,
        "per_device_eval_batch_size": 16,
        "max_completion_length": 6,
        "lr_scheduler_type": "constant",
        "learning_rate": 2e-2,
        "eval_steps": 20,
        "save_strategy": "no",
    }
    config = make_task_config(
        "grpo",
        model={"path": str(tmp_path / "model")},
        reward=["my_rewards:early"],
        training=training,
    )
    report = train(config, console=QUIET)
    before = report.eval_metrics["reward"][0][1]
    assert report.eval_metrics_after["reward"] > before + 0.1


@pytest.mark.parametrize("task", ["grpo", "rloo"])
def test_answers_are_sampled_from_resident_weights(make_task_config, task):
    """And the reference, asked in between, is the base; no second model is there."""
    config = make_task_config(
        task,
        model={"dtype": "bfloat16"},
        training={"beta": 0.1, "max_steps": 3, "eval_strategy": "no", "bf16": True},
    )
    trainer = make_trainer(config)
    assert trainer.ref_model is None
    layer = next(m for m in trainer.model.modules() if isinstance(m, PacaLayer))
    base = layer.weight.detach().clone()
    seen = []

    def look(module, args, output):
        if not torch.is_grad_enabled() and args[0].shape[1] == 1:  # a step of generation
            seen.append(layer.residency.kept is not None)

    handle = layer.register_forward_hook(look)
    trainer.train()
    handle.remove()
    # the first answers are the base's own, since nothing is trained yet
    assert len(seen) >= 14
    assert all(seen[len(seen) // 2 :])
    assert torch.equal(layer.weight, base)
    gaps = [
        entry["sampling/sampling_logp_difference/max"]
        for entry in trainer.state.log_history
        if "sampling/sampling_logp_difference/max" in entry
    ]
    assert len(gaps) == 3
    assert max(gaps) < 0.01


def interrupt(monkeypatch, config, step):
    plain, fired = RunTrainer.compute_loss, []

    def compute_loss(self, *args, **kwargs):
        if self.state.global_step == step - 1 and not fired:
            fired.append(True)
            signal.raise_signal(signal.SIGTERM)
        return plain(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(RunTrainer, "compute_loss", compute_loss)
        with pytest.raises(TrainingInterrupted, match=r"yaml --reward my_rewards:short --re"):
            train(config, console=QUIET)


@pytest.mark.parametrize(
    ("task", "step", "saved", "training"),
    [
        # in the second epoch, whose order TRL would forget
        ("grpo", 5, 5, {"num_train_epochs": 2, "max_steps": -1}),
        # in the middle of answers that are used for several steps
        ("rloo", 3, 4, {"steps_per_generation": 2, "num_iterations": 2, "max_steps": 5}),
    ],
)
def test_resumed_run_ends_with_the_same_tensors(
    make_task_config, tmp_path, monkeypatch, task, step, saved, training
):
    def config(name):
        more = {"output_dir": str(tmp_path / name), "eval_steps": 4, **training}
        return make_task_config(task, data={"eval_fraction": 0.8}, training=more)

    whole = train(config("whole"), console=QUIET)
    interrupt(monkeypatch, config("cut"), step)
    assert last_checkpoint(tmp_path / "cut").name == f"checkpoint-{saved}"
    cut = train(config("cut"), console=QUIET, resume=True)
    assert_same(tmp_path, whole, cut)


FAILING = """
calls = []


def short(completions, **kwargs):
    calls.append(len(completions))
    if {condition}:
        {action}
    return [-len(text) / 10 for text in completions]
"""


@pytest.mark.parametrize(
    ("task", "training", "good_calls", "kept"),
    [
        ("grpo", {"save_steps": 2}, 3, 2),
        # Answers serve four steps; the second ones are never scored.
        ("rloo", {"save_steps": 1, "num_iterations": 4}, 1, 4),
    ],
)
def test_a_reward_that_fails(
    make_task_config, tmp_path, rewards_module, task, training, good_calls, kept
):
    """Mended and resumed, the run is one that never failed."""

    def config(name):
        more = {"output_dir": str(tmp_path / name), "max_steps": 5, **training}
        return make_task_config(task, data={"eval_fraction": 0}, training=more)

    whole = train(config("whole"), console=QUIET)
    module = tmp_path / f"{rewards_module}.py"
    good = module.read_text()
    condition = f"len(calls) > {good_calls}"
    module.write_text(FAILING.format(condition=condition, action="raise OSError('no judge')"))
    sys.modules.pop(rewards_module)
    with pytest.raises(
        RewardError,
        match=r"reward 'my_rewards:short' raised OSError \(no judge\) on \d answers \(.*, row \d+ "
        rf"is the first\)\. Mend the function, then continue from .*checkpoint-{kept} with --res",
    ):
        train(config("cut"), console=QUIET)
    module.write_text(good)
    sys.modules.pop(rewards_module)
    cut = train(config("cut"), console=QUIET, resume=True)
    assert_same(tmp_path, whole, cut)


def test_a_reward_that_fails_at_once(make_task_config, tmp_path, rewards_module):
    action = "return [float('nan')] * len(completions)"
    text = FAILING.format(condition="True", action=action)
    (tmp_path / f"{rewards_module}.py").write_text(text)
    config = make_task_config("grpo", data={"eval_fraction": 0})
    message = r"returned nan for .*prompts.jsonl, row \d+.* Mend the function, then start again"
    with pytest.raises(RewardError, match=message):
        train(config, console=QUIET)


def test_a_reward_may_say_nothing(make_task_config, tmp_path, rewards_module):
    text = FAILING.format(condition="True", action="return [None] * len(completions)")
    (tmp_path / f"{rewards_module}.py").write_text(text)
    report = train(make_task_config("grpo", training={"max_steps": 2}), console=QUIET)
    assert "reward" not in report.train_metrics
    assert ("held-out reward after", "-") in report.table()


@pytest.mark.parametrize(("method", "beta"), [("moslora", 0.1), ("full", 0.0), ("qpaca", 0.1)])
def test_methods(make_task_config, method, beta):
    if method == "qpaca":
        pytest.importorskip("bitsandbytes")
    more = {"max_steps": 2, "eval_strategy": "no", "beta": beta}
    report = train(make_task_config("grpo", method, training=more), console=QUIET)
    assert report.num_steps == 2


def test_columns_chosen_by_data(make_task_config):
    section = PacaSection(selection_batches=2, normalize="input")
    more = {"max_steps": 1, "eval_strategy": "no"}
    report = train(make_task_config("grpo", paca=section, training=more), console=QUIET)
    assert report.columns == "random, num_batches 2, normalize input"


@pytest.mark.parametrize(("num_iterations", "steps"), [(1, [0, 2, 4, 5]), (4, [0, 4, 5])])
def test_the_best_checkpoint_is_that_of_the_highest_reward(
    make_task_config, tmp_path, num_iterations, steps
):
    """An evaluation that chooses it waits with the checkpoint until no answers are left."""
    training = {"eval_steps": 2, "save_steps": 2, "max_steps": 5, "num_iterations": num_iterations}
    config = make_task_config("grpo", training=training, early_stopping_patience=9)
    assert config.training.metric_for_best_model == "eval_reward"
    assert config.training.greater_is_better
    report = train(config, console=QUIET)
    assert sorted(dict(report.eval_metrics["reward"])) == steps
    folder = tmp_path / "out"
    best = read_state(last_checkpoint(folder))["best_model_checkpoint"]
    one, two = (load_file(Path(path) / "adapter_model.safetensors") for path in (folder, best))
    assert all(torch.equal(one[key], two[key]) for key in one)


def test_answers_that_are_logged_are_those_of_this_run(make_task_config, tmp_path):
    training = {"log_completions": True, "max_steps": 2}
    folder = tmp_path / "out" / "completions"
    train(make_task_config("grpo", training=training), console=QUIET)
    (folder / "completions_00009.parquet").touch()  # of a longer run
    train(make_task_config("grpo", training=training), console=QUIET, overwrite=True)
    assert {path.name for path in folder.iterdir()} == {
        f"completions_0000{step}.parquet" for step in (0, 1, 2)
    }


def test_reasoning_gym(make_task_config, tmp_path):
    pytest.importorskip("reasoning_gym")
    data = {"path": "reasoning-gym:chain_sum", "size": 20, "eval_fraction": 0.2}
    config = make_task_config("grpo", data=data, reward=[], training={"max_steps": 2})
    assert config.reward == ["reasoning-gym:chain_sum"]
    report = train(config, console=QUIET)
    assert "rewards/reasoning-gym.chain_sum/mean" in report.train_metrics
    text = (tmp_path / "out" / "config.yaml").read_text()
    assert text.startswith("# Repeat with: pacatune train --config config.yaml\n")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reward": []}, "there is no reward; give one on the command line, as in `--reward"),
        (
            {"method": "full", "training": {"beta": 0.1}},
            "or set `training.be",
        ),
        ({"training": {"use_transformers_paged": True}}, "TRL casts the trained weights for it"),
        ({"training": {"num_generations": 3}}, r"must be divisible by"),
    ],
)
def test_what_is_refused(make_task_config, options, message):
    with pytest.raises(ValueError, match=message):
        make_task_config("grpo", **options)


def test_resume_refuses_another_reward(make_task_config, monkeypatch):
    interrupt(monkeypatch, make_task_config("grpo"), 3)
    with pytest.raises(ValueError, match=r"reward: .*my_rewards:short'\] -> \['my_rewards:e"):
        train(make_task_config("grpo", reward=["my_rewards:even"]), resume=True)


def test_preview(make_task_config, console):
    preview(make_task_config("grpo"), 2, console=console)
    out = console.file.getvalue()
    assert "prompts.jsonl, row 1\nprompt (" in out
    assert ": <s>Count 0" in out
    assert "number: 0" in out


def test_a_bad_reward_is_found_before_weights(make_task_config, tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("weights were loaded")

    monkeypatch.setattr("pacatune.training.language.LanguageTask.load_model", refuse)
    with pytest.raises(ValueError, match="module 'my_rewards' has no attribute 'nosuch'"):
        train(make_task_config("grpo", reward=["my_rewards:nosuch"]))
    path = tmp_path / "bad.jsonl"
    path.write_text(json.dumps({"prompt": "a"}) + "\n" + json.dumps({"question": "b"}) + "\n")
    with pytest.raises(ValueError, match=r"bad.jsonl, row 2: field 'prompt' is missing"):
        train(make_task_config("grpo", data={"path": str(path)}))
    assert not (tmp_path / "out").exists()
