"""Whole runs on a tiny model."""

import json
import shutil

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from pacatune.adapters.loading import check_base
from pacatune.cli import main
from pacatune.training import train
from pacatune.training.config_file import read_values
from pacatune.training.sft import TextTrainer
from pacatune.training.task import task_of
from tests.training.runs import (
    CHECKPOINTING,
    QUIET,
    assert_same,
    assert_same_run,
    out_of_memory,
    read_json,
    refused,
    write_rows,
)

REPORT_KEYS = {
    *("eval_loss_before", "eval_loss_after", "train_loss", "num_trainable_parameters", "step_ms"),
    *("tokens_per_second", "peak_memory_bytes", "saved_activation_bytes", "seed", "versions"),
    "targets",
}
RESULT_NAMES = {"config.yaml", "report.json", "report.md", "loss.png", "README.md"}


def mean_loss(model, tokenizer, path, places):
    """Mean loss per answer token of some rows, in plain PyTorch."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    total = count = 0
    for place in places:
        messages = rows[int(place.rpartition(" ")[2]) - 1]["messages"]
        ids = tokenizer.apply_chat_template(messages, return_tensors="pt")["input_ids"]
        prompt = tokenizer.apply_chat_template(messages[:1], add_generation_prompt=True)
        start, end = len(prompt["input_ids"]), ids.shape[1] - 1  # not the last line break
        with torch.no_grad():
            log_probs = model(ids).logits[0, :-1].log_softmax(-1)
        chosen = log_probs.gather(1, ids[0, 1:, None])[start - 1 : end - 1]
        total, count = total - chosen.sum().item(), count + len(chosen)
    return total / count


@pytest.mark.parametrize("method", ["paca", "dora", "full"])
def test_run(make_config, data_path, tiny_model_dir, tiny_tokenizer, tmp_path, console, method):
    """What a run says and leaves; its losses are those of plain PyTorch on what it saved."""
    config = make_config(method, data={"eval_fraction": 0.1})
    report, out = train(config, console=console), tmp_path / "out"
    names = {path.name for path in out.iterdir()}
    weights = {"adapter_config.json", "adapter_model.safetensors"}
    assert names >= RESULT_NAMES | ({"model.safetensors"} if method == "full" else weights)
    assert ("adapter_config.json" in names) == (method != "full")
    assert not any("training_args" in name or ".pacatune/incomplete" in name for name in names)
    saved = read_json(out / "report.json")
    assert saved == json.loads(json.dumps(report.to_dict()))
    assert saved.keys() >= REPORT_KEYS
    assert report.num_steps == 7
    assert min(report.step_ms, report.tokens_per_second, report.saved_activation_bytes) > 0
    assert report.peak_memory_kind == "process_peak_resident"
    assert report.peak_memory_bytes > 2**20

    base = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    held_out = task_of(config).prepare().evaluation["place"]
    before = mean_loss(base, tiny_tokenizer, data_path, held_out)
    if method == "full":
        model = AutoModelForCausalLM.from_pretrained(out)
        assert AutoTokenizer.from_pretrained(out).chat_template
        assert report.targets == []
        assert report.num_trainable_parameters == model.num_parameters()
    else:
        assert len(report.targets) == 14
        assert not any("lm_head" in target for target in report.targets)
        model = PeftModel.from_pretrained(base, out)
    after = mean_loss(model, tiny_tokenizer, data_path, held_out)
    assert report.eval_loss_before == pytest.approx(before, rel=1e-4)
    assert report.eval_loss_after == pytest.approx(after, rel=1e-4)
    assert after < before - (0 if method == "full" else 0.1)
    if method != "paca":
        return

    assert check_base(out, AutoModelForCausalLM.from_pretrained(tiny_model_dir)) == []
    said = console.file.getvalue()
    assert "training 8,192 of 37,792 parameters (paca): 2 x q_proj (32 -> 32)" in said
    assert said.index("data: 54 examples, 6 held out") < said.index("step 0/7: evaluation loss")
    assert "held-out loss after" in said
    # The configuration beside the adapter repeats the run.
    again = tmp_path / "again"
    words = ["train", "--config", str(out / "config.yaml"), "--training.output_dir", str(again)]
    assert main(words) == 0
    assert_same_run(out, again)
    old, new = (read_values(folder / "config.yaml") for folder in (out, again))
    assert old["training"].pop("output_dir") != new["training"].pop("output_dir")
    assert old == new


@pytest.mark.parametrize(
    ("data", "training"), [({"eval_fraction": 0}, {}), ({}, {"eval_strategy": "no"})]
)
def test_run_without_evaluation(make_config, data, training):
    training |= {"max_steps": 2, "train_sampling_strategy": "sequential"}
    report = train(make_config(data=data, training=training), console=QUIET)
    assert report.eval_loss_before is report.eval_loss_after is None
    assert (report.num_train_examples, report.num_eval_examples) == (60, 0)
    shuffled = make_config(data=data, training={**training, "shuffle_dataset": True})
    other = train(shuffled, overwrite=True, console=QUIET)
    assert other.train_losses[0] != report.train_losses[0]


@pytest.mark.parametrize("strategy", ["bfd", "bfd_split"])
def test_packed_examples_are_trained_as_alone(make_config, strategy):
    options = {"per_device_train_batch_size": 57, "per_device_eval_batch_size": 60, "max_steps": 2}
    alone = train(make_config(training=options), console=QUIET)
    options |= {"packing": True, "packing_strategy": strategy, "max_length": 64}
    packed = train(make_config(training=options), overwrite=True, console=QUIET)
    assert packed.eval_loss_before == pytest.approx(alone.eval_loss_before, rel=1e-5)
    assert dict(packed.train_losses) == pytest.approx(dict(alone.train_losses), rel=1e-4)


@pytest.mark.parametrize(
    ("method", "more", "less", "share"),
    [
        ("paca", {}, {"training": {CHECKPOINTING: True}}, 1),
        ("paca", {"lean": "off"}, {"lean": "require"}, 0.85),
        ("lora", {"lean": "off"}, {"lean": "require"}, 0.85),
        ("full", {"lean": "off"}, {"lean": "require"}, 0.85),
        ("paca", {}, {"lean_level": 2}, 0.8),
    ],
)
def test_what_keeps_less_changes_no_loss(make_config, console, method, more, less, share):
    plain = train(make_config(method, **more), console=QUIET)
    lean = train(make_config(method, **less), overwrite=True, console=console)
    assert dict(lean.train_losses) == pytest.approx(dict(plain.train_losses), abs=1e-4)
    assert lean.saved_activation_bytes < share * plain.saved_activation_bytes
    made = "2 x attention, 2 x gated_mlp, 5 x norm"
    assert lean.lean["left"] == {}  # TRL computes the loss, in chunks as well
    shown = [dict(one.table())["lean activations"] for one in (plain, lean)]
    if more:
        assert shown == ["off", made]
        assert plain.lean is None
        assert "lean: 2 x attention" in console.file.getvalue()
    elif "lean_level" in less:
        assert shown[1] == f"level 2: {made}"
        assert plain.train_losses == lean.train_losses


def test_what_cannot_be_lean_is_said_once(make_config, console):
    eager = {"attn_implementation": "eager"}
    report = train(make_config(model=eager, training={"max_steps": 1}), console=console)
    ((reason, names),) = report.lean["left"].items()
    assert reason.startswith("eager attention keeps the scores of all pairs of tokens")
    assert len(names) == 2
    text = console.file.getvalue()
    assert text.count("eager attention keeps") == 2  # when it is made, and in the table at the end
    assert "self_attn and 1 more: eager attention" in text


def test_early_stopping_keeps_the_best(make_config, tmp_path):
    training = {
        **{"learning_rate": 0.5, "eval_steps": 1, "save_steps": 1, "num_train_epochs": 12},
        **{"lr_scheduler_type": "constant", "warmup_steps": 0},
    }
    report = train(make_config(training=training, early_stopping_patience=2), console=QUIET)
    best = min((loss, step) for step, loss in report.eval_losses if step > 0)
    assert report.num_steps == best[1] + 2 < 96
    assert report.eval_loss_after == pytest.approx(best[0], rel=1e-5)
    assert_same(tmp_path / f"out/checkpoint-{best[1]}", tmp_path / "out")


def test_warnings_about_the_data(make_config, tmp_path, console):
    path = write_rows(tmp_path / "long.jsonl", [{"text": "It is so. " * 80}, {"text": "No."}])
    training = {"max_steps": 1, "max_length": 300}
    train(
        make_config(data={"path": str(path), "eval_fraction": 0}, training=training),
        console=console,
    )
    said = console.file.getvalue()
    assert "training examples are cut at `training.max_length` (300)" in said
    assert "has 300 tokens, but the model was made for 256; lower `training.max_length`" in said


def test_what_fails_on_the_way(make_config, tiny_model_dir, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(TextTrainer, "training_step", out_of_memory)
        refused(r"out of memory .*`training.per_device_train_batch_size`", make_config())
    shutil.copytree(tiny_model_dir, tmp_path / "cut")
    weights = tmp_path / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:40_000])
    config = make_config(model={"path": str(tmp_path / "cut")})
    refused(r"the weights of .*cut cannot be read \(.*\); copy them", config, overwrite=True)

    # tokenizers reports a full disk by an Exception of no class of its own.
    def save_pretrained(self, *args, **kwargs):
        raise Exception("No space left on device (os error 28)")

    monkeypatch.setattr("transformers.PreTrainedTokenizerBase.save_pretrained", save_pretrained)
    message = r"could not write .*checkpoint-2' \(No space left on device"
    refused(message, make_config(), overwrite=True)
