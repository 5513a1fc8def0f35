import copy
import dataclasses
import re
from pathlib import Path

import pytest
import torch
from trl import SFTConfig

from pacatune.methods import METHODS, TEXT_METHODS
from pacatune.training import (
    DataConfig,
    LoraSection,
    ModelConfig,
    MosLoraSection,
    PacaSection,
    RunConfig,
    TrainingConfig,
)
from pacatune.training.arguments import ClassifierTrainingConfig
from pacatune.training.image import ImageModelConfig, ImageTrainingConfig
from pacatune.tuner import compat


def run_config(training=None, **options):
    return RunConfig(
        model=ModelConfig(path="m"),
        data=DataConfig(path="d"),
        training=TrainingConfig(**{"use_cpu": True, **(training or {})}),
        **options,
    )


def test_an_old_trl_is_refused(monkeypatch):
    monkeypatch.setattr(compat, "version", lambda name: "1.15.0")
    with pytest.raises(ValueError, match=r"`pacatune train` needs TRL 1.16 or newer, and this is"):
        run_config()


def test_model_path_is_required():
    with pytest.raises(ValueError, match=r"`model.path` is ''; give a hub id or the folder"):
        ModelConfig()


@pytest.mark.parametrize("kind", [ModelConfig, ImageModelConfig])
def test_dtypes(kind):
    assert kind(path="m", dtype="bf16").dtype == "bfloat16"
    with pytest.raises(ValueError, match=r"`model.dtype` \('bflaot16'\) .* mean 'bfloat16'\?"):
        kind(path="m", dtype="bflaot16")


def test_nothing_is_looked_up(monkeypatch):
    """A run is declared where its files are not."""

    looked_at = []
    for name in ("is_dir", "is_file", "exists", "open", "resolve"):
        plain = getattr(Path, name)

        def look(path, *args, plain=plain, **kwargs):
            looked_at.append(path)
            return plain(path, *args, **kwargs)

        monkeypatch.setattr(Path, name, look)
    training = {"use_cpu": True, "bf16": False}
    for options in ({"adapter": "a/m"}, {"paca": {"selection": "a/m"}}, {"task": "reward"}):
        run = RunConfig(
            **{"model": {"path": "a/m"}, "data": {"path": "a/d"}, "training": training, **options}
        )
        assert run.model.path == "a/m"
    assert not [path for path in looked_at if path.name in ("m", "d")]
    assert run.given["paca"] == {}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"task": "spo"}, r"`task` \('spo'\) must be one of sft, dpo.* did you mean"),
        ({"method": "vera"}, r"`method` \('vera'\) must be one of paca, qpaca, lora, "),
        ({"lean_level": 4}, r"`lean_level` \(4\) must be 1, 2 or 3"),
        ({"lean": "off", "lean_level": 2}, r"`lean_level` \(2\) with `lean` \('off'\)"),
        (
            {"training": {"max_step": 3}},
            "unknown option training.max_step; did you mean 'max",
        ),
        ({"reward": ["a:f"]}, r"the task sft has no `reward` \(\['a:f'\]\); drop it"),
        (
            {"task": "image", "adapter": "a"},
            r"the task image has no `adapter` \('a'\); drop it",
        ),
        (
            {"data": "d.jsonl"},
            r"`data` is a str; it must be a mapping of options, or a",
        ),
    ],
)
def test_sections_as_mappings(options, message):
    run = {"model": {"path": "m"}, "data": {"path": "d"}, "training": {"use_cpu": True}}
    with pytest.raises((ValueError, TypeError), match=message):
        RunConfig(**{**run, **options})


def test_sections_may_be_used_again():
    sections = {
        "model": ModelConfig(path="m"),
        "data": DataConfig(path="d"),
        "training": TrainingConfig(use_cpu=True),
        "lora": LoraSection(),
    }
    sections["training"].distributed_state = None  # no two of them are equal
    before = copy.deepcopy({name: vars(section) for name, section in sections.items()})
    for method in TEXT_METHODS:
        run = RunConfig(method=method, **sections)
        rate = METHODS[method].text_rate
        assert run.training.learning_rate == run.training.given["learning_rate"] == rate
        assert run.model.quantization == METHODS[method].quantization
        assert run.lora.lora_dropout == (METHODS[method].dropout or 0)
    assert run_config({"learning_rate": 0.1}).training.learning_rate == 0.1
    assert RunConfig(**sections, early_stopping_patience=2).training.load_best_model_at_end
    assert {name: vars(section) for name, section in sections.items()} == before


def test_training_of_another_type():
    with pytest.raises(
        TypeError, match=r"is a SFTConfig; .* or a pacatune.training.TrainingConfig"
    ):
        RunConfig(
            model=ModelConfig(path="m"),
            data=DataConfig(path="d"),
            training=SFTConfig(use_cpu=True, bf16=False, gradient_checkpointing=None),
        )


def test_has_every_option_of_trl():
    ours = {field.name for field in dataclasses.fields(TrainingConfig)}
    assert ours == {field.name for field in dataclasses.fields(SFTConfig)}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"chat_template_path": "x"}, r"chat_template_path` \('x'\) is not offered: set `data.ch"),
        ({"completion_only_loss": False}, "not offered: set `data.loss`"),
        ({"assistant_only_loss": True}, "not offered: set `data.loss`"),
        ({"dataset_text_field": "body"}, "not offered: name the column 'text'"),
        ({"dataset_kwargs": {"skip_prepare_dataset": True}}, "not offered: data is always"),
        ({"resume_from_checkpoint": "x"}, "not offered: use --resume"),
        ({"trust_remote_code": True}, "not offered: code of a model is never executed"),
        ({"push_to_hub": True}, r"not offered: give --push_to_hub ORGANISATION/NAME on"),
        ({"truncation_mode": "keep_end"}, "not offered: examples are cut at their end"),
        ({"remove_unused_columns": False}, "not offered: the data has the columns"),
        ({"activation_offloading": True, "use_cpu": True}, "offloading` .* needs a GPU; drop it"),
    ],
)
def test_options_decided_elsewhere(options, message):
    with pytest.raises(ValueError, match=message):
        TrainingConfig(**options)


def test_given_values_stay_as_given():
    training = TrainingConfig(use_cpu=True)
    assert training.given["report_to"] == "tensorboard"
    assert training.report_to == ["tensorboard"]


@pytest.mark.parametrize("fast", [True, False])
def test_mixed_precision_is_pinned_to_what_is_fast(monkeypatch, fast):
    monkeypatch.setattr("pacatune.training.arguments.bfloat16_is_fast", lambda use_cpu: fast)
    training = TrainingConfig()
    assert training.bf16 is fast
    assert training.given["bf16"] is fast
    again = TrainingConfig(**training.given)
    assert again.bf16 is fast


@pytest.mark.skipif(torch.accelerator.is_available(), reason="there is an accelerator")
@pytest.mark.parametrize("bf16", [True, False])
def test_the_cpu_is_said_to_be_the_device_where_there_is_no_other(bf16):
    """Otherwise accelerate, under torchrun, takes each process for the only one."""
    assert TrainingConfig(bf16=bf16).use_cpu


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="CPUs have no fp16")
def test_mixed_precision_is_not_forced_onto_fp16():
    assert TrainingConfig(fp16=True).bf16 is False


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"eval_strategy": "epoch"}, "requires the save and eval strategy to match"),
        ({"eval_steps": 0.3}, "requires the saving steps to be a multiple of the evaluation"),
        (
            {"eval_strategy": "no", "save_strategy": "no"},
            "need evaluation data; set `data.eval_path`",
        ),
    ],
)
def test_early_stopping_needs_checkpoints_of_evaluations(options, message):
    with pytest.raises(ValueError, match=message):
        run_config(options, early_stopping_patience=2)


@pytest.mark.parametrize("strategy", ["steps", "epoch"])
def test_early_stopping(strategy):
    training = run_config(
        {"eval_strategy": strategy, "save_strategy": strategy}, early_stopping_patience=2
    ).training
    assert training.load_best_model_at_end
    assert training.metric_for_best_model == "eval_loss"
    assert training.greater_is_better is False


def test_nothing_is_held_out_where_nothing_is_evaluated():
    assert run_config({"eval_strategy": "no"}).data.eval_fraction == 0
    kept = run_config().data.eval_fraction
    assert kept == DataConfig(path="d").eval_fraction > 0


@pytest.mark.parametrize(
    ("data", "given"),
    [
        ({"eval_path": "e"}, "data.eval_path"),
        ({"eval_split": "test"}, "data.eval_split"),
        ({"eval_fraction": 0.2}, "data.eval_fraction"),
    ],
)
def test_evaluation_that_is_asked_for_and_switched_off(data, given):
    rule = f"`training.eval_strategy` ('no') evaluates nothing, and `{given}`"
    with pytest.raises(ValueError, match=re.escape(rule)):
        RunConfig(
            model=ModelConfig(path="m"),
            data=DataConfig(**{"path": "d", **data}),
            training=TrainingConfig(use_cpu=True, eval_strategy="no"),
        )


@pytest.mark.parametrize("kind", [TrainingConfig, ImageTrainingConfig, ClassifierTrainingConfig])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fp16": True}, r"`training.fp16` \(True\) needs a GPU; drop it"),
        ({"fp16_full_eval": True}, "not offered: it rounds the weights that are saved"),
        ({"bf16_full_eval": True}, "not offered: it rounds the weights that are saved"),
    ],
)
def test_precisions_that_are_not_had(kind, options, message):
    with pytest.raises(ValueError, match=message):
        kind(use_cpu=True, **options)
    assert kind(use_cpu=True, bf16=True).bf16


@pytest.mark.parametrize(
    "options",
    [
        {"per_device_train_batch_size": 0},
        {"per_device_eval_batch_size": -1},
        {"gradient_accumulation_steps": 0},
        {"num_train_epochs": 0},
        {"max_length": 0},
        {"learning_rate": 0.0},
        {"learning_rate": -1e-3},
        {"learning_rate": float("inf")},
        {"eval_steps": 0},
        {"save_steps": 0},
        {"logging_steps": -1},
        {"save_total_limit": 0},
        {"max_steps": 0},
        {"max_steps": -5},
    ],
)
def test_numbers_that_train_nothing(options):
    ((name, value),) = options.items()
    with pytest.raises(ValueError, match=rf"`training.{name}` \({value}\) must be above 0; raise"):
        run_config(options)


def test_numbers_that_do_not_matter():
    assert run_config({"num_train_epochs": 0, "max_steps": 3, "max_length": None})


@pytest.mark.parametrize(
    "options",
    [
        {"early_stopping_patience": 2},
        {"training": {"load_best_model_at_end": True}},
        {"training": {"save_strategy": "best", "metric_for_best_model": "eval_loss"}},
    ],
)
def test_best_of_no_evaluation(options):
    training = TrainingConfig(use_cpu=True, **options.pop("training", {}))
    with pytest.raises(ValueError, match=r"need evaluation data; set `data.eval_path` or"):
        RunConfig(
            model=ModelConfig(path="m"),
            data=DataConfig(path="d", eval_fraction=0),
            training=training,
            **options,
        )


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        (
            "lora",
            {"paca": PacaSection(r=64)},
            r"`paca.r` \(64\) is an option of paca, qpaca, and `meth",
        ),
        (
            "shira",
            {"lora": LoraSection(lora_alpha=4.0)},
            r"`lora.lora_alpha` \(4.0\): what `method` \('shira'\) trains is not scaled; drop it",
        ),
        (
            "full",
            {"lora": LoraSection(r=4)},
            r"`lora.r` \(4\) is an option of lora, lora_dropout",
        ),
        ("lora", {"moslora": MosLoraSection(mixer_init="orthogonal")}, r"`moslora.mixer_init`"),
    ],
)
def test_options_of_another_method(method, options, message):
    with pytest.raises(ValueError, match=message):
        run_config(method=method, **options)
    run_config(method="moslora", lora=LoraSection(r=4), paca=PacaSection())
