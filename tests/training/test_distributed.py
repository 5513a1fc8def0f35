"""R6: two processes on CPUs (gloo) give the losses and the adapter of one.

Sharded checkpoints of FSDP2: what they hold, and runs that go on from them.
"""

import io
import re
import shutil
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from rich.console import Console
from safetensors.torch import load_file
from torch.distributed.checkpoint.filesystem import FileSystemReader
from transformers import AutoModelForCausalLM

from pacatune.training import train
from pacatune.training.output import refuse_missing_weights
from tests.examples.test_launch import LAUNCH, accelerate_options, environment_of
from tests.forks import Program, check_several_processes, run_python
from tests.training import runs
from tests.training.launching import COMMAND, ON_TWO_GPUS, launch, save_config
from tests.training.runs import ADAPTER, QUIET, assert_same, read_json, refused

FSDP_ON_CPU = str(Path(__file__).with_name("fsdp_on_cpu.py"))
ON_CPU = f"import runpy; runpy.run_path({FSDP_ON_CPU!r}, run_name='__main__')"


def launched(name, *words):
    """What `accelerate launch` makes of a file of ours."""
    # Any free port: the usual one may be another test's.
    return accelerate_options(LAUNCH / f"{name}.yaml", "--main_process_port", "0", *words)


def launcher_options(name):
    """The environment in which a file of ours lets `pacatune` run, and what runs in it."""
    code = {"code": ON_CPU} if name == "fsdp2" else {}
    return {"env": environment_of(launched(name)), **code}


def config_of(make_config, data_path, tmp_path, name, batch_size, quantization=None):
    """Ten steps, each of eight examples over all processes."""
    lines = data_path.read_text().splitlines(keepends=True)
    (tmp_path / "train.jsonl").write_text("".join(lines[:40]))
    (tmp_path / "held.jsonl").write_text("".join(lines[40:53]))  # which two do not share alike
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
    reports = [read_json(folder, "report.json") for folder in (first, second)]
    losses = [dict(report["train_losses"]) for report in reports]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    before = [report["eval_loss_before"] for report in reports]
    assert before[0] == pytest.approx(before[1], rel=1e-2)  # in other batches
    assert reports[0]["eval_loss_after"] == pytest.approx(reports[1]["eval_loss_after"], rel=2e-2)
    for key in ("num_trainable_parameters", "targets", "num_steps"):
        assert reports[0][key] == reports[1][key]
    runs.assert_close(first, second, rtol=1e-3, atol=1e-5)


def assert_whole(checkpoint):
    """What a run goes on from has every tensor in full."""
    saved = torch.load(checkpoint / "pytorch_model_fsdp.bin", weights_only=True)
    saved = {re.sub(r"\.default(\.weight)?$", "", name): saved[name] for name in saved}
    adapter = load_file(checkpoint / "adapter_model.safetensors")
    assert saved.keys() == adapter.keys()
    assert all(torch.equal(saved[name], adapter[name]) for name in adapter)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "quantization"), [("ddp", None), ("fsdp2", None), ("fsdp2", "nf4")]
)
def test_two_processes_equal_one(make_config, data_path, tmp_path, launcher, quantization):
    config = config_of(make_config, data_path, tmp_path, "one", 8, quantization)
    train(config, console=QUIET)
    config = config_of(make_config, data_path, tmp_path, "two", 4, quantization)
    save_config(config, tmp_path / "run.yaml")
    options = launcher_options(launcher)
    done = launch("train", "--config", tmp_path / "run.yaml", **options)
    assert done.stdout.count("data: 40 examples, 13 held out") == 1
    assert_close(tmp_path / "one", tmp_path / "two")
    if launcher == "fsdp2":
        assert_whole(tmp_path / "two/checkpoint-4")
    if quantization is not None:
        return

    # Resumed from the middle, the very same.
    folder = cut(tmp_path / "two", 4, "cut")
    words = ["train", "--config", tmp_path / "run.yaml", "--resume", "--training.output_dir"]
    launch(*words, folder, **options)
    assert_same(tmp_path / "two", folder)
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


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--training.learning_rte", "1"], "unknown option --training.learning_rte; did you mean"),
        (["--data.eval_fraction", "2"], "`data.eval_fraction` (2.0) must be in [0, 1)"),
    ],
)
def test_wrong_words_are_said_once(tiny_model_dir, words, said):
    """By the first process of a machine; the others end as it does."""
    check_several_processes()
    words = ["train", "--model.path", str(tiny_model_dir), "--data.path", "data.jsonl", *words]
    env = [{"WORLD_SIZE": "2", "RANK": rank, "LOCAL_RANK": rank} for rank in "01"]
    programs = [Program(COMMAND, *words, env=one) for one in env]
    done = [program.wait() for program in programs]
    assert [one.returncode for one in done] == [2, 2]
    assert done[0].stderr.startswith(f"pacatune: error: {said}")
    assert (done[0].stderr.count("\n"), done[1].stderr) == (1, "")


def test_each_gpu_gets_a_process(make_config, data_path, tmp_path):
    check_several_processes()
    train(config_of(make_config, data_path, tmp_path, "one", 8), console=QUIET)
    config = config_of(make_config, data_path, tmp_path, "two", 4)
    config.training.use_cpu = False
    save_config(config, tmp_path / "run.yaml")
    words, env = ["train", "--config", tmp_path / "run.yaml"], {"GLOO_SOCKET_IFNAME": "lo"}
    done = run_python(ON_TWO_GPUS, *words, env=env)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("2 GPUs, a process on each; CUDA_VISIBLE_DEVICES=0 takes one\n")
    assert done.stdout.count("data: 40 examples, 13 held out") == 1
    assert_close(tmp_path / "one", tmp_path / "two")

    # A signal to the command reaches its processes once: they save a checkpoint and stop.
    folder = tmp_path / "long"
    words += ["--training.output_dir", folder, "--training.num_train_epochs", "200"]
    program = Program(ON_TWO_GPUS, *words, env=env)
    while not (folder / "checkpoint-2").exists():
        assert program.is_alive(), program.wait().stderr
        time.sleep(0.01)
    program.send_signal(signal.SIGINT)
    done = program.wait()
    assert done.returncode == 130, done.stderr
    (step,) = re.findall(r"stopped at step (\d+) of 1000; continue with", done.stderr)
    assert (folder / f"checkpoint-{step}").is_dir()


def sharded_options():
    options = launcher_options("fsdp2")
    options["env"]["FSDP_STATE_DICT_TYPE"] = "SHARDED_STATE_DICT"
    return options


def saved_names(checkpoint, what):
    return set(FileSystemReader(checkpoint / what).read_metadata().state_dict_metadata)


@pytest.mark.slow
def test_sharded_checkpoints(make_config, data_path, tiny_model_dir, tmp_path):
    """They hold the adapter whole and shards of what is trained; other numbers go on."""

    def configure(name, batch_size):
        config = config_of(make_config, data_path, tmp_path, name, batch_size)
        vars(config.training).update(max_steps=6, eval_steps=2, load_best_model_at_end=True)
        config.paca.modules_to_save = ["lm_head"]
        return config

    # It starts from an adapter of one process.
    first = configure("first", 8)
    vars(first.training).update(max_steps=2)
    train(first, console=QUIET)
    save_config(configure("two", 4), tmp_path / "run.yaml")
    start = ["--adapter", tmp_path / "first"]
    launch("train", "--config", tmp_path / "run.yaml", *start, **sharded_options())
    one, two = (read_json(tmp_path / name, "report.json") for name in ("first", "two"))
    assert two["eval_loss_before"] == pytest.approx(one["eval_loss_after"], rel=1e-2)

    # A checkpoint has the whole adapter, and shards of nothing but what is trained and chosen.
    checkpoint = tmp_path / "two/checkpoint-6"
    assert_same(checkpoint, tmp_path / "two")
    whole = load_file(checkpoint / ADAPTER)
    assert saved_names(checkpoint, "pytorch_model_fsdp_0") == {f"model.{name}" for name in whole}
    base = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    model = PeftModel.from_pretrained(base, checkpoint, is_trainable=True)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    states = saved_names(checkpoint, "optimizer_0")
    assert {n.split(".", 2)[2].rpartition(".")[0] for n in states if ".state." in n} == trained

    # A run that goes on from one ends with the very same.
    folder = cut(tmp_path / "two", 2, "cut")
    words = ["train", "--config", tmp_path / "run.yaml", *start, "--resume"]
    words += ["--training.output_dir"]
    launch(*words, folder, **sharded_options())
    assert_same(folder, tmp_path / "two")

    # One process goes on from two, and four from one; a state that was lost would move the weights.
    before = tmp_path / "two"
    for num_processes, step in ((1, 2), (4, 4)):
        folder = cut(before, step, f"by {num_processes}")
        size = ["--training.per_device_train_batch_size", 8 // num_processes]
        launch(*words, folder, *size, num_processes=num_processes, **sharded_options())
        assert_close(folder, tmp_path / "two")
        before = folder

    # A process that shards nothing cannot read the shards.
    config = configure(cut(tmp_path / "two", 4, "plain").name, 8)
    config = replace(config, adapter=str(tmp_path / "first"))
    kind = "FSDP2 with fsdp_state_dict_type SHARDED_STATE_DICT and cannot be continued by a run"
    message = (
        f"checkpoint-4 was saved by {kind} without FSDP2 or DeepSpeed. Launch the run as before"
    )
    refused(message, config, resume=True)

    refuse_missing_weights(checkpoint)
    (checkpoint / "optimizer_0/__1_0.distcp").unlink()
    message = r"optimizer_0/__1_0.distcp was written by .* a disk that all nodes"
    with pytest.raises(ValueError, match=message):
        refuse_missing_weights(checkpoint)
