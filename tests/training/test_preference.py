"""DPO, KTO and reward models on tiny models."""

import gc

import pytest
import torch
import transformers
from peft import PeftModel

from pacatune.training import train
from pacatune.training.language import Task
from tests.training.runs import QUIET, assert_close, make_trainer


@pytest.mark.parametrize("method", ["paca", "lora"])
def test_dpo(make_task_config, tmp_path, method):
    report = train(make_task_config("dpo", method), console=QUIET)
    # ln 2: at first model and reference are the same
    assert report.eval_loss_before == pytest.approx(0.6931, abs=1e-4)
    assert report.eval_loss_after < report.eval_loss_before - 0.05
    assert report.eval_metrics_after["rewards/margins"] > 0.1
    assert report.eval_metrics_after["rewards/accuracies"] == 1
    assert [step for step, _ in report.train_metrics["rewards/margins"]] == [1, 2, 3, 4, 5, 6]
    assert ("held-out accuracy after", "1.0000") in report.table()
    assert "- dpo\n" in (tmp_path / "out/README.md").read_text()
    assert "task: dpo\n" in (tmp_path / "out/config.yaml").read_text()


def test_curves_are_those_of_the_steps_though_another_checkpoint_is_kept(make_task_config):
    """Here the best has the greatest loss, so that it is not the last."""
    kept = {"load_best_model_at_end": True, "greater_is_better": True}
    config = make_task_config("dpo", training={"eval_steps": 1, "save_steps": 1, **kept})
    report = train(config, console=QUIET)
    losses, margins = dict(report.eval_losses), dict(report.eval_metrics["rewards/margins"])
    assert report.eval_loss_after == pytest.approx(losses[1], rel=1e-4)
    assert report.eval_metrics_after["rewards/margins"] == pytest.approx(margins[1], rel=1e-2)
    assert losses[6] < losses[1]
    assert margins[6] > 2 * margins[1]


def test_kto(make_task_config, console):
    report = train(make_task_config("kto"), console=console)
    assert report.eval_loss_before == pytest.approx(0.5)
    assert report.eval_metrics_after["rewards/margins"] > 0.03
    assert report.num_train_examples == 64  # two answers of each of 32 pairs


@pytest.mark.parametrize("method", ["paca", "lora", "full"])
def test_reward_model(make_task_config, tiny_model_dir, tmp_path, method):
    """The saved head and adapter score as they did in training."""
    config = make_task_config("reward", method, training={"max_steps": 8})
    report = train(config, console=QUIET)
    assert report.eval_loss_after < report.eval_loss_before - 0.1
    assert report.eval_metrics_after["accuracy"] == 1
    load, folder = transformers.AutoModelForSequenceClassification.from_pretrained, tmp_path / "out"
    if method == "full":
        model = load(folder)
    else:
        model = PeftModel.from_pretrained(load(tiny_model_dir, num_labels=1), folder)
    task = Task(config)
    held_out = task.evaluation
    batch = task.collate(held_out, range(len(held_out)))
    with torch.no_grad():
        loss = task.data.loss(model.eval(), batch)
    assert float(loss) == pytest.approx(report.eval_loss_after, rel=1e-4)


@pytest.mark.parametrize(
    ("task", "method"),
    [("kto", "paca"), *(("dpo", name) for name in ("paca", "lora", "dora", "qpaca"))],
)
def test_the_reference_is_the_base_without_a_second_model(make_task_config, task, method):
    if method == "qpaca":
        pytest.importorskip("bitsandbytes")
    config = make_task_config(task, method, training={"max_steps": 2, "eval_strategy": "no"})
    trainer = make_trainer(config)
    batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    before = trainer.compute_ref_log_probs(trainer.model, batch)
    trainer.train()
    after = trainer.compute_ref_log_probs(trainer.model, batch)
    assert all(torch.equal(*pair) for pair in zip(before, after, strict=True))
    assert trainer.ref_model is None
    assert list(trainer.model.peft_config) == ["default"]
    if (task, method) == ("dpo", "paca"):
        base_class = type(trainer.model.get_base_model())
        assert sum(type(found) is base_class for found in gc.get_objects()) == 1
        # the same numbers by the base alone, in plain PyTorch
        base = Task(config).load_model()
        with torch.no_grad():
            logits = base(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        chosen = logits[:, :-1].log_softmax(-1).gather(2, batch["input_ids"][:, 1:, None])[..., 0]
        sums = (chosen * batch["completion_mask"][:, 1:]).sum(1)
        torch.testing.assert_close(torch.cat(after), sums, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("task", ["dpo", "kto"])
def test_reference_passes_between_forward_and_backward_change_no_gradient(
    make_task_config, tmp_path, task
):
    """The reference looks at the base between a forward pass of the columns and its backward."""
    for name, precompute in (("asked", False), ("known", True)):
        training = {"output_dir": str(tmp_path / name), "precompute_ref_log_probs": precompute}
        train(make_task_config(task, training={**training, "max_steps": 4}), console=QUIET)
    assert_close(tmp_path / "asked", tmp_path / "known", rtol=1e-4, atol=1e-6)
