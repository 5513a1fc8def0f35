"""A run stops at the first step that is not finite, and keeps what was good before it."""

import math
import re

import pytest
import torch
from safetensors.torch import load_file
from trl import SFTTrainer

from pacatune.cli import main
from pacatune.training import TrainingDiverged, train
from pacatune.training.sft import TextTrainer
from tests.training.launching import save_config
from tests.training.runs import QUIET, make_trainer

EVERY_STEP = {"save_steps": 1, "max_steps": 6, "eval_strategy": "no"}
NO_EVALUATION = {"eval_fraction": 0.0}
KEEP_ONE = {**EVERY_STEP, "save_total_limit": 1}


def poison(monkeypatch, step, *, gradient=False):
    """Let a step's loss, or its gradients alone, be infinite."""
    plain = TextTrainer.compute_loss

    def compute_loss(self, model, *args, **kwargs):
        loss = plain(self, model, *args, **kwargs)
        if not torch.is_grad_enabled() or self.state.global_step != step - 1:
            return loss
        if not gradient:
            return loss * math.inf
        loss.register_hook(lambda grad: grad * math.inf)
        return loss

    monkeypatch.setattr(TextTrainer, "compute_loss", compute_loss)


@pytest.fixture
def diverges(tmp_path):
    """Train until it diverges; return the steps of the checkpoints, whose weights are finite."""

    def check(config, message, **options):
        with pytest.raises(TrainingDiverged, match=message):
            train(config, console=QUIET, **options)
        assert not (tmp_path / "out" / "report.json").exists()
        for path in tmp_path.rglob("out/**/*.safetensors"):
            assert all(tensor.isfinite().all() for tensor in load_file(path).values()), path
        return checkpoints(tmp_path / "out")

    return check


def checkpoints(folder):
    return sorted(int(path.name.rpartition("-")[2]) for path in folder.glob("checkpoint-*"))


PLAIN = {"bf16": False, "gradient_checkpointing": None}
TEN_STEPS = {"max_steps": 10, "logging_steps": 1, "report_to": "none", "use_cpu": True}


def test_a_default_warm_up_of_one_step_trains_something(make_config, tmp_path):
    """transformers gives it the rate 0; here it has half of the peak, and no other step differs."""
    config = make_config(training={**TEN_STEPS, "save_steps": 10, "learning_rate": 1.0})
    trainer = make_trainer(config)
    assert trainer.args.warmup_steps == 0.03
    trainer.create_optimizer_and_scheduler(10)
    rates = []
    for _ in range(10):
        rates.append(trainer.optimizer.param_groups[0]["lr"])
        assert {*trainer.lr_scheduler.get_last_lr()} == {rates[-1]}
        trainer.optimizer.step()
        trainer.lr_scheduler.step()
    trainer.lr_scheduler = None
    rate = SFTTrainer.create_scheduler(trainer, 10).lr_lambdas[0]
    assert rate(0) == 0
    assert rates == [0.5, *map(rate, range(1, 10))]


def test_command_says_where_it_diverged(make_config, tmp_path, capsys):
    training = {**EVERY_STEP, "save_steps": 4, "learning_rate": 1e38}
    save_config(make_config(training=training), tmp_path / "run.yaml")
    assert main(["train", "--config", str(tmp_path / "run.yaml")]) == 2
    out, err = capsys.readouterr()
    step = r"the loss of step 2 is nan; the learning rate is .*e\+3.: lower"
    fix = r"`training.learning_rate` \(1e\+38\).* None is the last good checkpoint."
    assert re.search(f"^pacatune: error: training diverged: {step} {fix}$", err, re.MULTILINE)
    assert "loss 0.0000" not in out
    assert checkpoints(tmp_path / "out") == []


@pytest.mark.parametrize(
    ("gradient", "kept", "message"),
    [(False, 3, "loss of step 5 is inf"), (True, 4, "gradient norm of step 5 is nan")],
)
def test_last_good_checkpoint_is_named_and_kept(
    make_config, tmp_path, monkeypatch, diverges, gradient, kept, message
):
    config = make_config(training=KEEP_ONE)
    with monkeypatch.context() as patch:
        poison(patch, 5, gradient=gradient)
        message = rf"the {message}; .*out/checkpoint-{kept} is the last good checkpoint"
        assert kept in diverges(config, message)
        if not gradient:
            # From checkpoint-4, whose weights give the loss that is not finite.
            diverges(config, r"step 5 is inf.*checkpoint-3 is the last good", resume=True)
    train(config, resume=True, console=QUIET)
    assert checkpoints(tmp_path / "out") == [6]  # as many as asked


def test_first_step_is_not_blamed_on_the_rate(make_config, monkeypatch, diverges):
    poison(monkeypatch, 1)
    message = r"loss of step 1 is inf before any weight was .*`model.dtype: float32`"
    diverges(make_config(training=EVERY_STEP), message)


def test_weights_that_are_not_finite_are_never_saved(make_config, monkeypatch, diverges):
    plain = TextTrainer._save_checkpoint

    def save(self, *args, **kwargs):
        if self.state.global_step == 3:
            parameter = next(p for p in self.model.parameters() if p.requires_grad)
            parameter.data.view(-1)[0] = math.inf
        return plain(self, *args, **kwargs)

    monkeypatch.setattr(TextTrainer, "_save_checkpoint", save)
    name = r"weight '.*paca_delta.*' is not finite after step 3"
    message = rf"{name}.*checkpoint-2 is the last good"
    assert diverges(make_config(training=EVERY_STEP), message) == [1, 2]


def test_result_that_is_not_finite_is_not_saved(make_config, tmp_path, monkeypatch, diverges):
    plain = TextTrainer.train

    def spoil(self, *args, **kwargs):
        plain(self, *args, **kwargs)
        next(p for p in self.model.parameters() if p.requires_grad).data.fill_(math.nan)

    monkeypatch.setattr(TextTrainer, "train", spoil)
    config = make_config(data={"eval_fraction": 0}, training=EVERY_STEP)
    diverges(config, "is not finite after step 6")
    assert not (tmp_path / "out" / "adapter_model.safetensors").exists()


def test_evaluation_loss(make_config, monkeypatch, diverges):
    plain = SFTTrainer.compute_loss

    def compute_loss(self, *args, **kwargs):
        found = plain(self, *args, **kwargs)
        if torch.is_grad_enabled() or self.state.global_step != 4:
            return found
        # In one batch only: a mean over the others would look well.
        seen.append(found)
        spoilt = math.nan if len(seen) == 1 else 1
        return (found[0] * spoilt, *found[1:]) if isinstance(found, tuple) else found * spoilt

    seen = []
    monkeypatch.setattr(SFTTrainer, "compute_loss", compute_loss)
    message = r"evaluation loss after step 4 is nan.*out/checkpoint-2 is the last good"
    assert diverges(make_config(data={"eval_fraction": 0.2}), message) == [2]
