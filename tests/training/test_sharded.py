"""Sharded checkpoints of FSDP2: what they hold, and runs that go on from them."""

import shutil

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch.distributed.checkpoint.filesystem import FileSystemReader
from transformers import AutoModelForCausalLM

from pacatune.training.config_file import save_config
from pacatune.training.output import refuse_missing_shards
from tests.training.launching import launch
from tests.training.test_distributed import config_of, launcher_options


def sharded_options():
    options = launcher_options("fsdp2")
    options["env"]["FSDP_STATE_DICT_TYPE"] = "SHARDED_STATE_DICT"
    return options


def cut(folder, step, name):
    """Return a copy of a run as it was when it had saved a step."""
    copy = folder.with_name(name)
    shutil.copytree(folder, copy)
    (copy / "report.json").unlink()
    for checkpoint in copy.glob("checkpoint-*"):
        if int(checkpoint.name.removeprefix("checkpoint-")) > step:
            shutil.rmtree(checkpoint)
    return copy


def saved_names(checkpoint, what):
    return set(FileSystemReader(checkpoint / what).read_metadata().state_dict_metadata)


@pytest.mark.slow
def test_sharded_checkpoints(make_config, data_path, tiny_model_dir, tmp_path):
    config = config_of(make_config, data_path, tmp_path, "two", 4)
    config.training.given.update(max_steps=6, eval_steps=2, load_best_model_at_end=True)
    config.paca.modules_to_save = ["lm_head"]
    save_config(config, tmp_path / "run.yaml")
    launch("train", "--config", tmp_path / "run.yaml", **sharded_options())

    # A checkpoint has the whole adapter, and shards of nothing but what is trained and chosen.
    checkpoint = tmp_path / "two/checkpoint-6"
    adapter, whole = (
        load_file(folder / "adapter_model.safetensors") for folder in (checkpoint, tmp_path / "two")
    )
    assert adapter.keys() == whole.keys()
    assert all(torch.equal(adapter[name], whole[name]) for name in whole)
    assert saved_names(checkpoint, "pytorch_model_fsdp_0") == {f"model.{name}" for name in whole}
    base = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    model = PeftModel.from_pretrained(base, checkpoint, is_trainable=True)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    states = saved_names(checkpoint, "optimizer_0")
    assert {n.split(".", 2)[2].rpartition(".")[0] for n in states if ".state." in n} == trained

    # A run that goes on from one ends with the very same.
    folder = cut(tmp_path / "two", 2, "cut")
    words = ["--config", tmp_path / "run.yaml", "--training.output_dir", folder]
    launch("train", *words, "--resume", **sharded_options())
    again = load_file(folder / "adapter_model.safetensors")
    assert all(torch.equal(again[name], whole[name]) for name in whole)

    refuse_missing_shards(checkpoint)
    (checkpoint / "optimizer_0/__1_0.distcp").unlink()
    with pytest.raises(
        ValueError, match=r"__1_0.distcp of optimizer_0 was written by .* a disk that all nodes"
    ):
        refuse_missing_shards(checkpoint)
