"""Whole runs on a tiny model."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pacatune.adapters.loading import check_base
from pacatune.training import LoraSection, PacaSection, preview, train
from pacatune.training import recipe as recipe_module
from pacatune.training.config_file import read_values
from pacatune.training.language import LanguageTask
from pacatune.training.sft import TextTrainer

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
    assert not any("training_args" in name or ".pacatune/incomplete" in name for name in names)
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


@pytest.mark.parametrize(
    ("data", "training"), [({"eval_fraction": 0}, {}), ({}, {"eval_strategy": "no"})]
)
def test_run_without_evaluation(make_config, console, data, training):
    config = make_config(data=data, training={"max_steps": 2, **training})
    report = train(config, console=console)
    assert report.eval_loss_before is None
    assert report.eval_loss_after is None
    assert (report.num_train_examples, report.num_eval_examples) == (60, 0)


@pytest.mark.parametrize("strategy", ["bfd", "bfd_split"])
def test_packed_examples_are_trained_as_alone(make_config, console, strategy):
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


@pytest.mark.parametrize("method", ["paca", "lora", "full"])
def test_lean_or_not_gives_equal_losses_and_keeps_less(make_config, console, tmp_path, method):
    reports = {}
    for mode in ("require", "off"):
        output = {"output_dir": str(tmp_path / mode)}
        config = make_config(method, lean=mode, training=output)
        reports[mode] = train(config, console=console)
    lean, plain = reports["require"], reports["off"]
    assert [loss for _, loss in lean.train_losses] == pytest.approx(
        [loss for _, loss in plain.train_losses], abs=1e-4
    )
    assert lean.saved_activation_bytes < 0.85 * plain.saved_activation_bytes
    assert plain.lean is None
    assert {kind: len(names) for kind, names in lean.lean["made"].items()} == {
        "attention": 2,
        "gated_mlp": 2,
        "norm": 5,
    }
    # TRL computes the loss, in chunks as well.
    assert lean.lean["left"] == {}
    assert dict(lean.table())["lean activations"] == "2 x attention, 2 x gated_mlp, 5 x norm"
    assert dict(plain.table())["lean activations"] == "off"
    assert "lean: 2 x attention" in console.file.getvalue()


def test_lean_level_2_gives_the_losses_of_level_1_and_keeps_less(make_config, console, tmp_path):
    one, two = (
        train(
            make_config("paca", lean_level=level, training={"output_dir": str(tmp_path / name)}),
            console=console,
        )
        for level, name in ((1, "one"), (2, "two"))
    )
    assert two.train_losses == one.train_losses
    assert two.saved_activation_bytes < 0.8 * one.saved_activation_bytes
    assert two.lean["level"] == 2
    shown = dict(two.table())["lean activations"]
    assert shown == "level 2: 2 x attention, 2 x gated_mlp, 5 x norm"
    dropout = make_config("lora_dropout", lean="require", lean_level=2)
    with pytest.raises(ValueError, match=r"stays at level 1: dropout \(0.05\) cannot be computed"):
        train(dropout, console=console)


def test_what_cannot_be_lean_is_said_once_or_refused(make_config, console):
    eager = {"attn_implementation": "eager"}
    report = train(make_config(model=eager), console=console)
    ((reason, names),) = report.lean["left"].items()
    assert reason.startswith("eager attention keeps the scores of all pairs of tokens")
    assert len(names) == 2
    text = console.file.getvalue()
    assert text.count("eager attention keeps") == 2  # when it is made, and in the table at the end
    assert "self_attn and 1 more: eager attention" in text


def test_required_but_impossible_is_found_before_the_weights_are_loaded(
    make_config, console, monkeypatch
):
    monkeypatch.setattr(LanguageTask, "load_model", lambda *_, **__: pytest.fail("loaded"))
    config = make_config(model={"attn_implementation": "eager"}, lean="require")
    with pytest.raises(ValueError, match="this model cannot be all lean, which 'require' asks for"):
        train(config, console=console)


def test_targets_and_parameters_are_shown_before_training(make_config, console):
    train(make_config(training={"max_steps": 1}), console=console)
    out = console.file.getvalue()
    assert "training 8,192 of 37,792 parameters (paca): 2 x q_proj (32 -> 32)" in out
    assert out.index("data: 57 examples, 3 held out") < out.index("step 0/1: evaluation loss")
    assert "held-out loss after" in out


def test_preview_loads_no_weights(make_config, console, monkeypatch):
    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", None)
    preview(make_config(), 2, console=console)
    out = console.file.getvalue()
    assert out.count("tokens,") == 2
    assert "[[It is 7.</s>]]" in out


def test_warnings_about_the_data_are_shown(make_config, console):
    config = make_config(training={"max_steps": 1, "max_length": 18})
    train(config, console=console)
    assert "training examples are cut at `training.max_length` (18)" in console.file.getvalue()


class TestBeforeWeights:
    """What is refused, is refused before any weight is loaded and anything is written."""

    @pytest.fixture(autouse=True)
    def no_weights(self, monkeypatch, tmp_path):
        def refuse(*args, **kwargs):
            raise AssertionError("weights were loaded")

        monkeypatch.setattr(LanguageTask, "load_model", refuse)
        yield
        assert not (tmp_path / "out").exists()

    def test_bad_row(self, make_config, tmp_path):
        path = tmp_path / "bad.jsonl"
        path.write_text('{"text": "a"}\n{"text": ""}\n')
        with pytest.raises(ValueError, match=r"bad.jsonl, row 2: 'text' is "):
            train(make_config(data={"path": str(path)}))

    def test_target_that_matches_nothing(self, make_config):
        from pacatune.training import LoraSection, PacaSection

        with pytest.raises(ValueError, match="no_such"):
            train(make_config(paca=PacaSection(target_modules=["no_such"])))
        with pytest.raises(ValueError, match="no_such"):
            train(make_config("lora", lora=LoraSection(target_modules=["no_such"])))

    def test_rank_out_of_range(self, make_config):
        from pacatune.training import PacaSection

        with pytest.raises(ValueError, match=r"33.*32"):
            train(make_config(paca=PacaSection(r=33)))

    def test_flash_attention_that_is_not_installed(self, make_config):
        with pytest.raises(ImportError, match=r"FlashAttention2 .* seem to be installed"):
            train(make_config(model={"attn_implementation": "flash_attention_2"}))

    def test_tracker_that_is_not_installed(self, make_config):
        with pytest.raises(ValueError, match=r"`training.report_to` \('wandb'\) is not installed"):
            train(make_config(training={"report_to": "wandb"}))

    def test_model_that_does_not_exist(self, make_config):
        with pytest.raises(OSError, match="no/such"):
            train(make_config(model={"path": "./no/such"}))


def test_too_long_for_the_model_is_a_warning(make_config, tmp_path, console):
    path = tmp_path / "long.jsonl"
    rows = [{"text": "It is so. " * 80}, {"text": "No."}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"path": str(path), "eval_fraction": 0}
    train(make_config(data=data, training={"max_steps": 1}), console=console)
    assert "tokens, but the model was made for 256; lower `training.max_length`" in (
        console.file.getvalue()
    )


def test_out_of_memory_says_what_to_lower(make_config, console, monkeypatch):
    def out_of_memory(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")

    monkeypatch.setattr(TextTrainer, "training_step", out_of_memory)
    with pytest.raises(ValueError, match=r"out of memory .*`training.per_device_train_batch_size`"):
        train(make_config(), console=console)


def test_several_gpus_in_one_process(make_config, monkeypatch):
    config = make_config()
    monkeypatch.setattr(type(config.training), "n_gpu", 2)
    with pytest.raises(ValueError, match="2 GPUs are visible to one process; start one process"):
        train(config)


def test_weights_that_are_cut_off(make_config, tiny_model_dir, tmp_path):
    shutil.copytree(tiny_model_dir, tmp_path / "cut")
    weights = tmp_path / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:40_000])
    with pytest.raises(ValueError, match=r"the weights of .*cut cannot be read \(.*\); copy them"):
        train(make_config(model={"path": str(tmp_path / "cut")}))


def test_checkpoint_that_is_cut_off(make_config, tmp_path, console, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(recipe_module, "save_result", interrupt)
        with pytest.raises(KeyboardInterrupt):
            train(make_config(training={"max_steps": 2}), console=console)
    weights = tmp_path / "out" / "checkpoint-2" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:4_000])
    with pytest.raises(ValueError, match=r"the weights of .*checkpoint-2 cannot be read"):
        train(make_config(training={"max_steps": 2}), resume=True, console=console)


def interrupt(*args):
    raise KeyboardInterrupt


def test_tokenizer_on_a_full_disk(make_config, tmp_path, console, monkeypatch):
    """tokenizers reports it by an Exception of no class of its own."""

    def save_pretrained(self, *args, **kwargs):
        raise Exception("No space left on device (os error 28)")

    monkeypatch.setattr("transformers.PreTrainedTokenizerBase.save_pretrained", save_pretrained)
    with pytest.raises(
        ValueError, match=r"could not write .*checkpoint-2' \(No space left on device"
    ):
        train(make_config(), console=console)


@pytest.mark.parametrize(("method", "section"), [("paca", PacaSection), ("lora", LoraSection)])
def test_expression_that_does_not_compile(make_config, method, section):
    with pytest.raises(ValueError, match=rf"{method}.*target_modules` \('\(q'\) is no regular exp"):
        make_config(method, **{method: section(target_modules="(q")})


@pytest.mark.parametrize("method", ["paca", "lora"])
def test_pattern_that_matches_nothing(make_config, method):
    section = {"paca": PacaSection, "lora": LoraSection}[method](rank_pattern={"q_prj": 2})
    with pytest.raises(ValueError, match=r"`rank_pattern`: 'q_prj' matches nothing .* 'q_proj'\?"):
        train(make_config(method, **{method: section}))
