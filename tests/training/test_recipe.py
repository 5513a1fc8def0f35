"""Whole runs on a tiny model."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pacatune.adapters.loading import check_base
from pacatune.training import train
from pacatune.training.config_file import read_values, to_values

REPORT_KEYS = {
    "eval_loss_before",
    "eval_loss_after",
    "train_loss",
    "num_trainable_parameters",
    "step_ms",
    "tokens_per_second",
    "peak_memory_bytes",
    "saved_activation_bytes",
    "seed",
    "versions",
    "targets",
}
RESULT_NAMES = {"config.yaml", "report.json", "report.md", "loss.png", "README.md"}


def mean_loss(model, tokenizer, path, places):
    """Mean loss per answer token of some rows, in plain PyTorch."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    total = count = 0
    for place in places:
        messages = rows[int(place) - 1]["messages"]
        ids = tokenizer.apply_chat_template(messages, return_tensors="pt")["input_ids"]
        prompt = tokenizer.apply_chat_template(messages[:1], add_generation_prompt=True)
        start, end = len(prompt["input_ids"]), ids.shape[1] - 1  # not the last line break
        with torch.no_grad():
            log_probs = model(ids).logits[0, :-1].log_softmax(-1)
        chosen = log_probs.gather(1, ids[0, 1:, None])[start - 1 : end - 1]
        total, count = total - chosen.sum().item(), count + len(chosen)
    return total / count


@pytest.mark.parametrize("method", ["paca", "lora", "dora"])
def test_adapter_run(make_config, data_path, tiny_model_dir, tiny_tokenizer, console, method):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    config = make_config(method, data={"eval_fraction": 0.1})
    report = train(config, console=console)

    folder = Path(config.training.output_dir)
    names = {path.name for path in folder.iterdir()}
    assert names >= RESULT_NAMES | {"adapter_config.json", "adapter_model.safetensors"}
    assert not any("training_args" in name or ".incomplete" in name for name in names)
    saved = json.loads((folder / "report.json").read_text())
    assert saved == json.loads(json.dumps(report.to_dict()))
    assert saved.keys() >= REPORT_KEYS

    assert report.num_steps == 7
    assert report.eval_loss_after < report.eval_loss_before - 0.1
    assert len(report.targets) == 14
    assert all("lm_head" not in target for target in report.targets)
    assert report.step_ms > 0
    assert report.tokens_per_second > 0
    assert report.saved_activation_bytes > 0
    assert report.peak_memory_kind == "process_peak_resident"

    base = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    if method == "paca":
        assert check_base(folder, base) == []  # the fingerprint of the base lies beside it
    from pacatune.data import prepare_data

    held_out = prepare_data(config.data, tiny_tokenizer, max_length=1024, stop_ids={2}).evaluation[
        "place"
    ]
    places = [place.rpartition(" ")[2] for place in held_out]
    before = mean_loss(base, tiny_tokenizer, data_path, places)
    model = PeftModel.from_pretrained(base, folder)
    after = mean_loss(model, tiny_tokenizer, data_path, places)
    assert report.eval_loss_before == pytest.approx(before, rel=1e-4)
    assert report.eval_loss_after == pytest.approx(after, rel=1e-4)


def test_full_run(make_config, tmp_path, console):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    config = make_config("full", training={"learning_rate": 1e-3})
    report = train(config, console=console)
    folder = tmp_path / "out"
    assert {path.name for path in folder.iterdir()} >= RESULT_NAMES | {"model.safetensors"}
    assert not (folder / "adapter_config.json").exists()
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert AutoTokenizer.from_pretrained(folder).chat_template
    assert report.num_trainable_parameters == model.num_parameters()
    assert report.targets == []
    assert report.eval_loss_after < report.eval_loss_before


def test_same_losses_as_plain_trl(make_config, tiny_model_dir, data_path, tmp_path, console):
    """The recipe adds nothing to what SFTTrainer computes."""
    from datasets import load_dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed
    from trl import SFTConfig, SFTTrainer

    settings = {
        "learning_rate": 1e-3,
        "num_train_epochs": 2,
        "gradient_accumulation_steps": 2,
        "per_device_train_batch_size": 4,
        "logging_steps": 1,
        "lr_scheduler_type": "linear",
        "warmup_steps": 0,
    }
    report = train(
        make_config("lora", data={"eval_fraction": 0}, training=settings), console=console
    )
    rows = load_dataset("json", data_files=str(data_path), cache_dir=tmp_path / "c")["train"]
    set_seed(42)  # older versions of TRL draw LoRA's A before they set it
    trainer = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(tiny_model_dir),
        args=SFTConfig(
            str(tmp_path / "plain"),
            report_to="none",
            bf16=False,
            use_cpu=True,
            gradient_checkpointing=None,
            dataloader_pin_memory=False,
            **settings,
        ),
        train_dataset=rows.map(
            lambda row: {"prompt": row["messages"][:1], "completion": row["messages"][1:]},
            remove_columns="messages",
        ),
        processing_class=AutoTokenizer.from_pretrained(tiny_model_dir),
        peft_config=LoraConfig(
            task_type="CAUSAL_LM", r=8, lora_alpha=16, target_modules="all-linear"
        ),
    )
    # Theirs also learns the line break after each answer.
    trainer.train_dataset = trainer.train_dataset.map(
        lambda row: {"labels": [*row["labels"][:-1], -100]}
    )
    trainer.train()
    theirs = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(theirs) == 16
    assert [loss for _, loss in report.train_losses] == theirs


def test_config_beside_the_adapter_repeats_the_run(make_config, tmp_path, console):
    from pacatune.cli import main

    config = make_config(training={"num_train_epochs": 0.5})
    train(config, console=console)
    saved = str(tmp_path / "out" / "config.yaml")
    again = str(tmp_path / "again")
    assert main(["train", "--config", saved, "--training.output_dir", again]) == 0
    first = load_file(tmp_path / "out" / "adapter_model.safetensors")
    second = load_file(tmp_path / "again" / "adapter_model.safetensors")
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    old, new = (
        read_values(tmp_path / "out/config.yaml"),
        read_values(tmp_path / "again/config.yaml"),
    )
    assert old["training"].pop("output_dir") != new["training"].pop("output_dir")
    assert old == new


def test_run_without_evaluation(make_config, console):
    config = make_config(data={"eval_fraction": 0}, training={"max_steps": 2})
    report = train(config, console=console)
    assert report.eval_loss_before is None
    assert report.eval_loss_after is None
    assert report.num_eval_examples == 0


@pytest.mark.parametrize("strategy", ["bfd", "bfd_split"])
def test_packed_examples_are_trained_as_alone(make_config, console, monkeypatch, strategy):
    """Only with flash attention in use, but sdpa masks this model right too, at a cost."""
    monkeypatch.setattr("pacatune.training.sft.check_attention", lambda config: None)
    options = {"per_device_train_batch_size": 57, "per_device_eval_batch_size": 60, "max_steps": 2}
    alone = train(make_config(training=options), console=console)
    options |= {"packing": True, "packing_strategy": strategy, "max_length": 64}
    packed = train(make_config(training=options), overwrite=True, console=console)
    assert packed.eval_loss_before == pytest.approx(alone.eval_loss_before, rel=1e-5)
    for (_, one), (_, two) in zip(alone.train_losses, packed.train_losses, strict=True):
        assert one == pytest.approx(two, rel=1e-4)


def test_checkpointed_activations_change_no_loss(make_config, console):
    plain = train(make_config(training={"max_steps": 3}), console=console)
    name = "activation_checkpointing"
    name = name if hasattr(make_config().training, name) else "gradient_checkpointing"
    config = make_config(training={"max_steps": 3, name: True})
    lean = train(config, overwrite=True, console=console)
    for (_, one), (_, two) in zip(plain.train_losses, lean.train_losses, strict=True):
        assert one == pytest.approx(two, rel=1e-5)
    assert lean.saved_activation_bytes < plain.saved_activation_bytes


def test_shuffled_data_set_is_honoured(make_config, console):
    options = {"max_steps": 2, "train_sampling_strategy": "sequential"}
    plain = train(make_config(training=options), console=console)
    config = make_config(training={**options, "shuffle_dataset": True})
    shuffled = train(config, overwrite=True, console=console)
    assert shuffled.train_losses[0] != plain.train_losses[0]


def test_early_stopping_keeps_the_best(make_config, tmp_path, console):
    config = make_config(
        training={
            "learning_rate": 0.5,
            "eval_steps": 1,
            "save_steps": 1,
            "num_train_epochs": 12,
            "lr_scheduler_type": "constant",
            "warmup_steps": 0,
        },
        early_stopping_patience=2,
    )
    report = train(config, console=console)
    losses = dict(report.eval_losses)
    best = min((loss, step) for step, loss in losses.items() if step > 0)
    assert report.num_steps == best[1] + 2 < 96
    assert report.eval_loss_after == pytest.approx(best[0], rel=1e-5)
    kept = load_file(tmp_path / f"out/checkpoint-{best[1]}" / "adapter_model.safetensors")
    final = load_file(tmp_path / "out/adapter_model.safetensors")
    assert all(torch.equal(kept[name], final[name]) for name in kept)


def test_saved_config_names_what_was_used(make_config):
    values = to_values(make_config())
    assert values["training"]["learning_rate"] == 5e-3
    assert values["training"]["num_train_epochs"] == 1.0
