"""DPO, KTO and reward models on tiny models."""

import gc
import json
import signal

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from pacatune.training import LoraSection, PacaSection, TrainingInterrupted, preview, train
from pacatune.training import recipe as recipe_module
from pacatune.training.task import task_of
from pacatune.training.trainer import RunTrainer

QUIET = Console(quiet=True)


def make_trainer(config):
    task = task_of(config)
    prepared = recipe_module.prepare(task, QUIET)
    return recipe_module.make_trainer(task, prepared, None, QUIET)


def first_batch(trainer):
    return trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))


@pytest.mark.parametrize("method", ["paca", "lora"])
def test_dpo(make_task_config, tmp_path, console, method):
    report = train(make_task_config("dpo", method), console=console)
    out = console.file.getvalue()
    # ln 2: at first model and reference are the same
    assert "step 0/6: evaluation loss 0.6931, rewards/accuracies 0.0000, rewards/margins 0" in out
    assert report.eval_loss_after < report.eval_loss_before - 0.05
    assert report.eval_metrics_after["rewards/margins"] > 0.1
    assert report.eval_metrics_after["rewards/accuracies"] == 1
    assert [step for step, _ in report.train_metrics["rewards/margins"]] == [1, 2, 3, 4, 5, 6]
    assert ("held-out accuracy after", "1.0000") in report.table()
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names >= {"adapter_model.safetensors", "report.json", "README.md", "loss.png"}
    card = (tmp_path / "out" / "README.md").read_text()
    assert "- dpo\n" in card
    assert "task: dpo\n" in (tmp_path / "out" / "config.yaml").read_text()
    assert json.loads((tmp_path / "out" / "report.json").read_text())["eval_metrics_after"]


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
    assert "kl" in report.train_metrics


@pytest.mark.parametrize("method", ["paca", "lora", "full"])
def test_reward_model(make_task_config, tiny_model_dir, tmp_path, method):
    """The saved head and adapter score as they did in training."""
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification

    report = train(make_task_config("reward", method, training={"max_steps": 8}), console=QUIET)
    assert report.eval_loss_after < report.eval_loss_before - 0.1
    assert report.eval_metrics_after["accuracy"] == 1
    folder = tmp_path / "out"
    assert "text-classification" in (folder / "README.md").read_text()
    if method == "full":
        model = AutoModelForSequenceClassification.from_pretrained(folder)
    else:
        base = AutoModelForSequenceClassification.from_pretrained(tiny_model_dir, num_labels=1)
        model = PeftModel.from_pretrained(base, folder)
    task = task_of(make_task_config("reward", method))
    prepared = task.prepare()
    batch = task.collate(prepared.evaluation, range(len(prepared.evaluation)))
    with torch.no_grad():
        loss = task.loss(model.eval(), batch)
    assert float(loss) == pytest.approx(report.eval_loss_after, rel=1e-4)


@pytest.mark.parametrize(
    ("task", "method"),
    [("kto", "paca"), *(("dpo", name) for name in ("paca", "lora", "dora", "moslora", "qpaca"))],
)
def test_the_reference_is_the_base_without_a_second_model(
    make_task_config, tiny_model_dir, task, method
):
    if method == "qpaca":
        pytest.importorskip("bitsandbytes")
    config = make_task_config(task, method, training={"max_steps": 2, "eval_strategy": "no"})
    trainer = make_trainer(config)
    batch = first_batch(trainer)
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
        base = task_of(config).load_model()
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
    results = []
    for name, precompute in (("asked", False), ("known", True)):
        training = {"output_dir": str(tmp_path / name), "precompute_ref_log_probs": precompute}
        train(make_task_config(task, training={**training, "max_steps": 4}), console=QUIET)
        results.append(load_file(tmp_path / name / "adapter_model.safetensors"))
    for name, tensor in results[0].items():
        torch.testing.assert_close(tensor, results[1][name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("task", ["dpo", "reward"])
def test_same_losses_as_plain_trl(make_task_config, tiny_model_dir, tmp_path, task):
    """The recipe adds nothing to what TRL's trainers compute."""
    import trl
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import (
        AutoModelForCausalLM,
        AutoModelForSequenceClassification,
        AutoTokenizer,
        set_seed,
    )

    rows = [{"prompt": f"{i}?", "chosen": f" {7 * i % 10}", "rejected": " no"} for i in range(16)]
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {"max_steps": 4, "per_device_train_batch_size": 4, "lr_scheduler_type": "linear"}
    ours = make_task_config(
        task, "lora", data={"path": str(path), "eval_fraction": 0}, training=settings, lean="off"
    )
    report = train(ours, console=QUIET)

    name = {"dpo": "DPO", "reward": "Reward"}[task]
    arguments = getattr(trl, f"{name}Config")(
        str(tmp_path / "plain"),
        **settings,
        learning_rate=5e-3,
        logging_steps=1,
        report_to="none",
        bf16=False,
        use_cpu=True,
        activation_checkpointing=False,
        save_strategy="no",
    )
    kind = AutoModelForCausalLM if task == "dpo" else AutoModelForSequenceClassification
    set_seed(42)
    model = kind.from_pretrained(tiny_model_dir, **({} if task == "dpo" else {"num_labels": 1}))
    adapter = LoraConfig(
        r=8,
        lora_alpha=16,
        target_modules=ours.lora.target_modules
        or ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        task_type="CAUSAL_LM" if task == "dpo" else "SEQ_CLS",
    )
    trainer = getattr(trl, f"{name}Trainer")(
        model,
        args=arguments,
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(tiny_model_dir),
        peft_config=adapter,
    )
    trainer.train()
    losses = [(e["step"], e["loss"]) for e in trainer.state.log_history if "loss" in e]
    assert losses == [(step, pytest.approx(loss, rel=1e-5)) for step, loss in report.train_losses]


def interrupt(monkeypatch, config, step):
    plain = RunTrainer.compute_loss

    def compute_loss(self, *args, **kwargs):
        if self.state.global_step == step - 1:
            signal.raise_signal(signal.SIGTERM)
        return plain(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(RunTrainer, "compute_loss", compute_loss)
        with pytest.raises(TrainingInterrupted):
            train(config, console=QUIET)


@pytest.mark.parametrize("task", ["dpo", "kto", "reward"])
def test_resumed_run_ends_with_the_same_tensors(make_task_config, tmp_path, monkeypatch, task):
    def config(name):
        return make_task_config(task, training={"output_dir": str(tmp_path / name)})

    whole = train(config("whole"), console=QUIET)
    interrupt(monkeypatch, config("cut"), 3)
    cut = train(config("cut"), console=QUIET, resume=True)
    one, two = (load_file(tmp_path / n / "adapter_model.safetensors") for n in ("whole", "cut"))
    assert all(torch.equal(one[key], two[key]) for key in one)
    assert whole.train_losses == cut.train_losses
    assert whole.train_metrics == cut.train_metrics
    assert whole.eval_metrics == cut.eval_metrics


def test_columns_chosen_by_data(make_task_config):
    for task in ("dpo", "kto", "reward"):
        section = PacaSection(selection="gradient", selection_batches=2, normalize="input")
        config = make_task_config(
            task, paca=section, training={"max_steps": 1, "eval_strategy": "no"}
        )
        report = train(config, console=QUIET, overwrite=True)
        assert report.columns == "gradient, num_batches 2, normalize input"


@pytest.mark.parametrize(
    ("task", "method", "options", "message"),
    [
        (
            "dpo",
            "full",
            {},
            r"`method` \('full'\) with `task` \('dpo'\): the reference is the model",
        ),
        ("kto", "full", {}, "or set `training.precompute_ref_log_probs` to true"),
        (
            "dpo",
            "paca",
            {"paca": PacaSection(bias="all")},
            r"`paca.bias` \('all'\), which stays trained",
        ),
        ("dpo", "lora", {"lora": LoraSection(lora_dropout=0.1)}, r"`lora.lora_dropout` \(0.1, of"),
        ("reward", "lora_dropout", {}, r"is switched off by `training.disable_dropout` \(True\)"),
        ("dpo", "paca", {"training": {"sync_ref_model": True}}, "the reference is the pretrained"),
        ("dpo", "paca", {"training": {"truncation_mode": "keep_end"}}, "are cut at their end"),
        ("reward", "paca", {"training": {"chat_template_path": "x"}}, "set `data.chat_template`"),
    ],
)
def test_what_is_refused(make_task_config, task, method, options, message):
    with pytest.raises(ValueError, match=message):
        task_of(make_task_config(task, method, **options)).prepare()


def test_dropout_and_full_where_they_can_be(make_task_config):
    make_task_config("dpo", "lora_dropout", training={"disable_dropout": False})
    config = make_task_config("dpo", "full", training={"precompute_ref_log_probs": True})
    assert config.training.learning_rate == 5e-3
    assert make_task_config("dpo", training={"learning_rate": None}).training.learning_rate == (
        pytest.approx(5e-5)
    )
    reward = make_task_config("reward", training={"learning_rate": None})
    assert reward.training.learning_rate == 5e-4


@pytest.mark.parametrize(
    ("task", "shown"),
    [
        ("dpo", ["chosen (7 tokens): It is 0.</s>", "rejected (9 tokens):", "What is 0?"]),
        ("kto", ["label: True", "What is"]),
        ("reward", ["chosen (21 tokens):", "rejected (23 tokens):"]),
    ],
)
def test_preview(make_task_config, console, task, shown):
    preview(make_task_config(task), 2, console=console)
    out = console.file.getvalue()
    assert all(text in out for text in shown), out


def test_a_bad_row_is_found_before_weights(make_task_config, tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("weights were loaded")

    monkeypatch.setattr("pacatune.training.language.LanguageTask.load_model", refuse)
    path = tmp_path / "bad.jsonl"
    path.write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n{"prompt": "a"}\n')
    with pytest.raises(ValueError, match=r"bad.jsonl, row 2: field 'chosen' is missing"):
        train(make_task_config("dpo", data={"path": str(path)}))
    assert not (tmp_path / "out").exists()
