"""Whole runs on a tiny model."""

import json
import re
import shutil

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from pacatune.adapters.loading import check_base
from pacatune.cli import main
from pacatune.training import train
from pacatune.training.config_file import read_values
from pacatune.training.language import Task
from pacatune.training.sft import TextTrainer
from tests.training.runs import (
    CHECKPOINTING,
    QUIET,
    assert_same_run,
    out_of_memory,
    read_json,
    refused,
    write_rows,
)
from tests.tuner.moe import BOTH, build

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
def test_run(
    make_config, data_path, tiny_model_dir, tiny_tokenizer, tmp_path, console, monkeypatch, method
):
    """What a run says and leaves; its losses are those of plain PyTorch on what it saved."""
    config = make_config(method, data={"eval_fraction": 0.1})
    report, out = train(config, console=console), tmp_path / "out"
    names = {path.name for path in out.iterdir()}
    weights = {"adapter_config.json", "adapter_model.safetensors"}
    assert names >= RESULT_NAMES | ({"model.safetensors"} if method == "full" else weights)
    assert not any("training_args" in name or ".pacatune/incomplete" in name for name in names)
    saved = read_json(out / "report.json")
    assert saved == json.loads(json.dumps(report.to_dict()))
    assert report.num_steps == 7
    assert min(report.step_ms, report.tokens_per_second, report.saved_activation_bytes) > 0

    base = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    held_out = Task(config).evaluation["place"]
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
    code = (out / "README.md").read_text().split("```python\n")[1].split("```")[0]
    monkeypatch.chdir(tiny_model_dir.parent)  # the card has the folder's name alone
    exec(code.replace("FOLDER", str(out)), names := {})
    assert names["model"].active_adapter == "default"
    assert (
        "training 8,192 of 37,792 parameters (paca): 2 x q_proj (32 -> 32)"
        in console.file.getvalue()
    )
    # The configuration beside the adapter repeats the run.
    again = tmp_path / "again"
    words = ["train", "--config", str(out / "config.yaml"), "--training.output_dir", str(again)]
    assert main(words) == 0
    assert_same_run(out, again)
    old, new = (read_values(folder / "config.yaml") for folder in (out, again))
    assert old["training"].pop("output_dir") != new["training"].pop("output_dir")
    assert old == new


def test_run_without_evaluation(make_config):
    """Either says so; and data that is shuffled before it is read in order is another order."""
    training = {"max_steps": 2, "train_sampling_strategy": "sequential"}
    shuffled = {"shuffle_dataset": True, "eval_strategy": "no"}
    one, two = (
        train(make_config(data=data, training=training | more), overwrite=True, console=QUIET)
        for data, more in (({"eval_fraction": 0}, {}), ({}, shuffled))
    )
    for report in (one, two):
        assert report.eval_loss_before is report.eval_loss_after is None
        assert (report.num_train_examples, report.num_eval_examples) == (60, 0)
    assert one.train_losses[0] != two.train_losses[0]


def test_packed_examples_are_trained_as_alone(make_config):
    options = {"per_device_train_batch_size": 57, "per_device_eval_batch_size": 60, "max_steps": 2}
    alone = train(make_config(training=options), console=QUIET)
    for strategy in ("bfd", "bfd_split"):
        options |= {"packing": True, "packing_strategy": strategy, "max_length": 64}
        packed = train(make_config(training=options), overwrite=True, console=QUIET)
        assert packed.eval_loss_before == pytest.approx(alone.eval_loss_before, rel=1e-5)
        assert dict(packed.train_losses) == pytest.approx(dict(alone.train_losses), rel=1e-4)


@pytest.mark.parametrize("method", ["paca", "lora", "full"])
def test_what_keeps_less_changes_no_loss(make_config, console, method):
    made = "2 x attention, 2 x gated_mlp, 5 x norm"
    runs = [("off", {"lean": "off"}, 1), (made, {"lean": "require"}, 0.85)]
    if method == "paca":
        runs += [(made, {"training": {CHECKPOINTING: True}}, 0.85)]
        runs += [(f"level 2: {made}", {"lean_level": 2}, 0.7)]
    reports = [
        train(make_config(method, **options), overwrite=True, console=console)
        for _, options, _ in runs
    ]
    plain, lean, *others = reports
    for report, (shown, _, share) in zip(reports, runs, strict=True):
        assert dict(report.table())["lean activations"] == shown
        assert dict(report.train_losses) == pytest.approx(dict(plain.train_losses), abs=1e-4)
        assert report.saved_activation_bytes <= share * plain.saved_activation_bytes
    assert plain.lean is None
    assert lean.lean["left"] == {}  # TRL computes the loss, in chunks as well
    assert "lean: 2 x attention" in console.file.getvalue()
    assert all(one.saved_activation_bytes < lean.saved_activation_bytes for one in others)
    assert all(one.train_losses == lean.train_losses for one in others[1:])


def test_what_is_said_once(make_config, tmp_path, console):
    """What is wrong with the data, and what cannot be lean."""
    path = write_rows(tmp_path / "long.jsonl", [{"text": "It is so. " * 80}, {"text": "No."}])
    options = {"data": {"path": str(path), "eval_fraction": 0}}
    options |= {"model": {"attn_implementation": "eager"}}
    train(make_config(**options, training={"max_steps": 1, "max_length": 300}), console=console)
    said = console.file.getvalue()
    assert "has 300 tokens, but the model was made for 256; lower `training.max_length`" in said
    assert "self_attn and 1 more: eager attention keeps the scores of all pairs of tokens" in said


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


@pytest.mark.parametrize("place", ["write_fingerprint", "write_card", "_make_report"])
def test_what_fails_after_the_last_step(make_config, tiny_model_dir, monkeypatch, tmp_path, place):
    """Never deletes what was trained, checkpoints or not; --resume makes what is missing."""

    def fail(*args):
        raise KeyError("broken")

    config = make_config(training={"save_strategy": "no"} if place == "write_card" else {})
    with monkeypatch.context() as patch:
        patch.setattr(f"pacatune.training.recipe.{place}", fail)
        message = "KeyError: 'broken'. What was trained is in .*out; only the report is missing"
        refused(message, config)
    base = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    PeftModel.from_pretrained(base, tmp_path / "out")
    assert not (tmp_path / "out" / "report.json").exists()
    if place == "write_card":
        refused("no complete checkpoint", config, resume=True)
        refused("holds another run", config)
        return
    kept = load_file(tmp_path / "out" / "adapter_model.safetensors")
    train(config, resume=True, console=QUIET)
    again = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert all(torch.equal(kept[name], again[name]) for name in again)
    assert check_base(tmp_path / "out", base) == []


def test_experts_are_trained_beside_the_attention(make_config, tiny_tokenizer, tmp_path):
    config = {"dtype": torch.float32, "vocab_size": len(tiny_tokenizer)}
    build("mixtral", **config).save_pretrained(tmp_path / "model")
    tiny_tokenizer.save_pretrained(tmp_path / "model")
    options = {"model": {"path": str(tmp_path / "model")}, "training": {"max_steps": 2}}
    report = train(make_config(**options, paca={"r": 2, "target_parameters": BOTH}))
    assert report.eval_loss_after < report.eval_loss_before
    assert sum("mlp.experts" in name for name in report.targets) == 4
    assert sum("self_attn" in name for name in report.targets) == 8
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    moved = {name for name, x in tensors.items() if "experts" in name and x.abs().sum() > 0}
    for layer in (0, 1):
        for name in ("gate_up_proj.paca_delta", "down_proj.paca_delta"):
            assert any(f"layers.{layer}." in one and one.endswith(name) for one in moved)
    assert "fused experts are not made lean" in " ".join(report.lean["left"])


def test_a_run_that_ended_worse_says_so(make_config, tmp_path, console):
    training = {"learning_rate": 20, "max_steps": 4, "logging_steps": 1}
    train(make_config("full", training=training), console=console)
    line = console.file.getvalue().splitlines()[-1]
    fix = r"lower `training.learning_rate` \(20\)."
    assert re.fullmatch(rf"warning: the held-out loss rose from .* to .*: {fix}", line)
    said = line.removeprefix("warning: ")
    assert read_json(tmp_path / "out/report.json")["warnings"] == [said]
    for name in ("report.md", "README.md"):
        assert said in (tmp_path / "out" / name).read_text()


@pytest.mark.parametrize(
    ("weights", "bf16", "shown"),
    [
        ("float32", False, "cpu, float32"),
        ("float32", True, "cpu, float32, computed in bfloat16"),
        ("bfloat16", False, "cpu, bfloat16"),
        ("bfloat16", True, "cpu, bfloat16"),
    ],
)
def test_the_report_says_what_the_run_computed_in(
    make_config, tmp_path, monkeypatch, weights, bf16, shown
):
    computed, plain = set(), TextTrainer.compute_loss

    def compute_loss(self, model, *args, **kwargs):
        layer = model.get_submodule("base_model.model.model.layers.1.mlp.down_proj")
        hook = layer.register_forward_hook(lambda layer, args, output: computed.add(output.dtype))
        with hook:
            return plain(self, model, *args, **kwargs)

    monkeypatch.setattr(TextTrainer, "compute_loss", compute_loss)
    config = make_config(training={"bf16": bf16, "max_steps": 1}, model={"dtype": weights})
    config.lean = "off"  # or the layer is not called
    report = train(config, console=QUIET)
    assert computed == {getattr(torch, report.compute_dtype)}
    assert dict(report.table())["device, weights"] == shown
    saved = read_json(tmp_path / "out/report.json")
    assert (saved["dtype"], saved["compute_dtype"]) == (weights, report.compute_dtype)
