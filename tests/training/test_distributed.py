"""Two processes on CPUs (gloo) give the losses and the adapter of one."""

import importlib.metadata
import io
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from pacatune.cli import main
from pacatune.training import PacaSection, train
from pacatune.tuner import compat
from tests.examples.test_launch import LAUNCH
from tests.training.launching import launch, save_config

FSDP_ON_CPU = str(Path(__file__).with_name("fsdp_on_cpu.py"))
ON_CPU = f"import runpy; runpy.run_path({FSDP_ON_CPU!r}, run_name='__main__')"


def launcher_options(name):
    """The environment that `accelerate launch` makes of a file of ours, and what runs in it."""
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_multi_gpu_env

    # Any free port: the usual one may be another test's.
    words = ["--config_file", str(LAUNCH / f"{name}.yaml"), "--main_process_port", "0"]
    words += ["-m", "pacatune"]
    args, *_ = _validate_launch_command(launch_command_parser().parse_args(words))
    code = {"code": ON_CPU} if name == "fsdp2" else {}
    return {"env": prepare_multi_gpu_env(args), **code}


def config_of(make_config, data_path, tmp_path, name, batch_size, quantization=None):
    """Ten steps, each of eight examples over all processes."""
    lines = data_path.read_text().splitlines(keepends=True)
    (tmp_path / "train.jsonl").write_text("".join(lines[:40]))
    (tmp_path / "held.jsonl").write_text("".join(lines[40:56]))
    return make_config(
        model={"quantization": quantization},
        data={"path": str(tmp_path / "train.jsonl"), "eval_path": str(tmp_path / "held.jsonl")},
        training={
            "output_dir": str(tmp_path / name),
            "num_train_epochs": 2,
            "per_device_train_batch_size": batch_size,
            "save_total_limit": 20,
        },
    )


def cut(folder, step, name):
    """Return a copy of a run as it was when it had saved a step."""
    copy = folder.with_name(name)
    shutil.copytree(folder, copy)
    (copy / "report.json").unlink()
    for checkpoint in copy.glob("checkpoint-*"):
        if int(checkpoint.name.removeprefix("checkpoint-")) > step:
            shutil.rmtree(checkpoint)
    return copy


def assert_close(first, second):
    reports = [json.loads((folder / "report.json").read_text()) for folder in (first, second)]
    for one, two in zip(reports[0]["train_losses"], reports[1]["train_losses"], strict=True):
        assert one == pytest.approx(two, rel=1e-4)
    assert reports[0]["eval_loss_after"] == pytest.approx(reports[1]["eval_loss_after"], rel=1e-3)
    for key in ("num_trainable_parameters", "targets", "num_steps"):
        assert reports[0][key] == reports[1][key]
    one, two = (load_file(folder / "adapter_model.safetensors") for folder in (first, second))
    assert one.keys() == two.keys()
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=1e-3, atol=1e-5)


def assert_whole(checkpoint):
    """What a run goes on from has every tensor in full."""
    saved = torch.load(checkpoint / "pytorch_model_fsdp.bin", weights_only=True)
    saved = {re.sub(r"\.default(\.weight)?$", "", name): saved[name] for name in saved}
    adapter = load_file(checkpoint / "adapter_model.safetensors")
    assert saved.keys() == adapter.keys()
    assert all(torch.equal(saved[name], adapter[name]) for name in adapter)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "quantization"),
    [("ddp", None), ("fsdp2", None), ("fsdp2", "nf4")],
)
def test_two_processes_equal_one(make_config, data_path, tmp_path, launcher, quantization):
    config = config_of(make_config, data_path, tmp_path, "one", 8, quantization)
    train(config, console=Console(file=io.StringIO()))
    config = config_of(make_config, data_path, tmp_path, "two", 4, quantization)
    save_config(config, tmp_path / "run.yaml")
    options = launcher_options(launcher)
    done = launch("train", "--config", tmp_path / "run.yaml", **options)
    assert done.stdout.count("data: 40 examples, 16 held out") == 1
    assert_close(tmp_path / "one", tmp_path / "two")
    if launcher == "fsdp2":
        assert_whole(tmp_path / "two/checkpoint-4")
    if quantization is not None:
        return

    # Resumed from the middle, the very same.
    folder = cut(tmp_path / "two", 4, "cut")
    words = ["train", "--config", tmp_path / "run.yaml", "--resume", "--training.output_dir"]
    launch(*words, folder, **options)
    whole, again = (
        load_file(path / "adapter_model.safetensors") for path in (tmp_path / "two", folder)
    )
    assert all(torch.equal(whole[name], again[name]) for name in whole)
    if launcher != "ddp":
        return

    # By one process or two instead, each step has the same examples.
    cut(tmp_path / "two", 4, "one-goes-on")
    output = io.StringIO()
    config = config_of(make_config, data_path, tmp_path, "one-goes-on", 8)
    train(config, resume=True, console=Console(file=output, width=1000))
    assert "(2 processes x 4 examples x 1 accumulated before, 1 process x 8 " in output.getvalue()
    assert_close(tmp_path / "one-goes-on", tmp_path / "two")
    launch(*words, cut(tmp_path / "one", 4, "two-go-on"))
    assert_close(tmp_path / "two-go-on", tmp_path / "one")


@pytest.mark.slow
def test_two_processes_choose_the_columns_of_one(make_config, data_path, tmp_path):
    """One process takes twice as many batches of the same size; the statistics are of the same."""
    results = {}
    for name, accumulation in (("one", 2), ("two", 1)):
        config = config_of(make_config, data_path, tmp_path, name, 4)
        config.training.given.update(gradient_accumulation_steps=accumulation, max_steps=2)
        config.paca = PacaSection(r=4, selection="gradient", selection_batches=5)
        save_config(config, tmp_path / f"{name}.yaml")
        if name == "one":
            words = ["--config", str(tmp_path / "one.yaml")]
            assert main(["train", *words]) == 0
        else:
            done = launch("train", "--config", tmp_path / "two.yaml")
            assert done.stdout.count("columns chosen by gradient from 5 batches") == 1
        results[name] = json.loads((tmp_path / name / "adapter_config.json").read_text())
    assert results["one"]["columns"] == results["two"]["columns"]
    assert_close(tmp_path / "one", tmp_path / "two")


@pytest.mark.slow
def test_fsdp_that_accelerate_ignores_is_said(make_config, data_path, tmp_path):
    config = config_of(make_config, data_path, tmp_path, "two", 4)
    config.training.given["max_steps"] = 1
    save_config(config, tmp_path / "run.yaml")
    environment = launcher_options("fsdp2")["env"]
    done = launch("train", "--config", tmp_path / "run.yaml", env=environment)
    assert done.stdout.count("warning: accelerate shards nothing on CPUs") == 1


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("FSDP_VERSION", "1", r"`fsdp_version` \(1\) .* must be 2: PEFT loads no adapter"),
        (
            "FSDP_CPU_RAM_EFFICIENT_LOADING",
            "true",
            r"`fsdp_cpu_ram_efficient_loading` \(true\) .* must be false: accelerate cannot send",
        ),
    ],
)
def test_fsdp_that_would_lose_the_adapter_is_refused(
    make_config, monkeypatch, variable, value, message
):
    config = make_config()
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    monkeypatch.setenv(variable, value)
    with pytest.raises(ValueError, match=message):
        train(config, console=Console(file=io.StringIO()))
    assert not Path(config.training.output_dir).exists()


def test_accelerate_that_saves_parts_of_tensors_is_refused(make_config, monkeypatch):
    def version(name):
        return "1.14.0" if name == "accelerate" else importlib.metadata.version(name)

    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    config = make_config()
    monkeypatch.setattr(compat, "version", version)
    with pytest.raises(ValueError, match=r"FSDP2 needs accelerate 1.15 or newer, and this is 1"):
        train(config, console=Console(file=io.StringIO()))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"paca": PacaSection(normalize="weight")},
            r"`paca.normalize` \('weight'\) acts on the steps of single columns, and DeepSpeed",
        ),
        (
            {"paca": PacaSection(selection="gradient")},
            r"`paca.selection` \('gradient'\) .* needs the whole model, which DeepSpeed shards",
        ),
        (
            {"method": "full"},
            r"`zero3_save_16bit_model` \(false\) .* must be true: .* of `method` \('full'\)",
        ),
    ],
)
def test_deepspeed_that_would_go_wrong_is_refused(make_config, options, message):
    from accelerate.utils import DeepSpeedPlugin

    config = make_config(**options)
    config.training.deepspeed_plugin = DeepSpeedPlugin(zero_stage=3)
    with pytest.raises(ValueError, match=message):
        train(config, console=Console(file=io.StringIO()))
    assert not Path(config.training.output_dir).exists()


@pytest.mark.parametrize("name", ["tp_size", "cp_size", "sp_size"])
def test_layers_and_texts_that_are_not_split_are_said(make_config, monkeypatch, name):
    config = make_config()
    monkeypatch.setenv("ACCELERATE_USE_PARALLELISM_CONFIG", "true")
    monkeypatch.setenv(f"PARALLELISM_CONFIG_{name.upper()}", "2")
    with pytest.raises(ValueError, match=rf"`parallelism_config_{name}` \(2\) .* must be 1"):
        train(config, console=Console(file=io.StringIO()))
