"""Sharded checkpoints of FSDP2: what they hold, and runs that go on from them."""

import tempfile
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from transformers import AutoModelForCausalLM

from pacatune.training import train
from pacatune.training.output import refuse_missing_weights
from tests.training.launching import launch, save_config
from tests.training.runs import ADAPTER, QUIET, assert_equal, assert_same, read_json, refused
from tests.training.test_distributed import ON_CPU, assert_close, config_of, cut, launcher_options

# Saves what a resumed run has loaded, before it trains.
SAVE_AGAIN = f"""
import os
from pacatune.training.trainer import RunTrainer

plain = RunTrainer._load_optimizer_and_scheduler

def load_and_save(self, checkpoint):
    plain(self, checkpoint)
    self._save_optimizer_and_scheduler(os.environ["LOADED"])

RunTrainer._load_optimizer_and_scheduler = load_and_save
{ON_CPU}
"""


def sharded_options():
    options = launcher_options("fsdp2")
    options["env"]["FSDP_STATE_DICT_TYPE"] = "SHARDED_STATE_DICT"
    return options


def saved_names(checkpoint, what):
    return set(FileSystemReader(checkpoint / what).read_metadata().state_dict_metadata)


def read_shards(folder):
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch, "whole.pt")
        dcp_to_torch_save(folder, path)
        return torch.load(path, weights_only=True)


@pytest.mark.slow
def test_sharded_checkpoints(make_config, data_path, tiny_model_dir, tmp_path):
    """R6: they hold the adapter whole and shards of what is trained; other numbers go on."""

    def configure(name, batch_size):
        config = config_of(make_config, data_path, tmp_path, name, batch_size)
        config.training.given.update(max_steps=6, eval_steps=2, load_best_model_at_end=True)
        config.training.given["metric_for_best_model"] = "eval_loss"  # as a run settles it
        config.paca.modules_to_save = ["lm_head"]
        return config

    # It starts from an adapter of one process.
    first = configure("first", 8)
    first.training.given.update(max_steps=2)
    train(first, console=QUIET)
    save_config(configure("two", 4), tmp_path / "run.yaml")
    start = ["--adapter", tmp_path / "first"]
    launch("train", "--config", tmp_path / "run.yaml", *start, **sharded_options())
    one, two = (read_json(tmp_path / name, "report.json") for name in ("first", "two"))
    assert two["eval_loss_before"] == pytest.approx(one["eval_loss_after"], rel=1e-5)

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

    # One process goes on from two, and four from one, with the very state that was saved.
    before = tmp_path / "two"
    for num_processes, step in ((1, 2), (4, 4)):
        options = sharded_options()
        options["env"]["LOADED"] = str(tmp_path / f"loaded by {num_processes}")
        options["code"] = SAVE_AGAIN
        folder = cut(before, step, f"by {num_processes}")
        size = ["--training.per_device_train_batch_size", 8 // num_processes]
        launch(*words, folder, *size, num_processes=num_processes, **options)
        for what in ("pytorch_model_fsdp_0", "optimizer_0"):
            saved = read_shards(folder / f"checkpoint-{step}" / what)
            assert_equal(saved, read_shards(tmp_path / f"loaded by {num_processes}" / what))
        assert_close(folder, tmp_path / "two")
        before = folder

    # A process that shards nothing cannot read the shards.
    config = configure(cut(tmp_path / "two", 4, "plain").name, 8)
    config.adapter = str(tmp_path / "first")
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
